"""A cap on what runs may spend, and what is spent and reserved of it.

>>> from feste import context
>>> with context.set(budget=5.0):
...     print(context.get("budget"))
$5.00 ($0.00 spent, $0.00 reserved)
"""

from __future__ import annotations

import math
from typing import Any, Literal

__all__ = ["Budget", "shown_amount"]

Unit = Literal["dollars", "tokens"]

#: What rounding may add: far less than a token of the cheapest model.
_ROUNDING = 1e-12
#: Every cap is below: beyond, sums of floats overflow.
_MOST = 1e300


class Budget:
    """A cap in dollars or tokens that counts from where it is set; the brain alone changes it.

    The value of the setting ``budget``. Each ``context.set(budget=...)``, and each ``budget=`` of a
    run, makes one of its own; give the same object again to go on counting.

    :param cap: the most that may be spent, in units.
    :param unit: ``"dollars"`` or ``"tokens"``, read and generated ones together.

    >>> Budget.of("200000 tokens")
    Budget(200000, 'tokens')
    """

    __slots__ = ("cap", "pending", "reserved", "spent", "unit")

    def __init__(self, cap: float, unit: Unit = "dollars") -> None:
        self.cap = cap
        self.unit: Unit = unit
        #: What answers have cost, in units.
        self.spent = 0.0
        #: The most that requests may cost which are under way, or whose outcome is unknown.
        self.reserved = 0.0
        #: How many reservations will still be settled: those of requests under way.
        self.pending = 0

    @classmethod
    def of(cls, value: Any) -> Budget | None:
        """Return the budget for a value of the setting.

        :param value: dollars as a number, or text such as ``"200000 tokens"`` or ``"2.50"``; a
            Budget is returned as it is, and None or an empty text is no cap.
        :raises ValueError: if it is something else.
        """
        if value is None or isinstance(value, Budget):
            return value
        unit: Unit = "dollars"
        if isinstance(value, str):
            text = value.strip().replace("_", "").replace(",", "")
            if not text:
                return None
            if text.endswith("tokens"):
                unit, text = "tokens", text.removesuffix("tokens")
            try:
                value = int(text) if unit == "tokens" else float(text.removeprefix("$"))
            except ValueError:
                value = None
        if type(value) not in (int, float) or not 0 <= value < _MOST:
            raise ValueError(
                'expected dollars as a number from 0, or text such as "200000 tokens", or None'
            )
        return cls(value, unit)

    @property
    def left(self) -> float:
        """What is neither spent nor reserved, in units."""
        return max(0.0, self.cap - self.spent - self.reserved)

    def fits(self, amount: float) -> bool:
        """Return whether as much may be reserved now.

        :param amount: the most that a request may cost, in units.
        """
        return self.spent + self.reserved + amount <= self.cap * (1 + _ROUNDING)

    def reserve(self, amount: float) -> None:
        """Set an amount aside, before a request is sent.

        :param amount: the most that it may cost, in units.
        """
        self.reserved += amount
        self.pending += 1

    def settle(self, amount: float, used: float | None) -> None:
        """Put in place of a reservation what a request has cost.

        :param amount: what was reserved for it, in units.
        :param used: what it cost, in units; None if that is unknown, so that it stays reserved.
        """
        self.pending -= 1
        if used is not None:
            self.reserved = max(0.0, self.reserved - amount)
            self.spent += used

    def shown(self, amount: float) -> str:
        """Return an amount as text, with the unit.

        :param amount: the amount, in units.
        """
        return shown_amount(amount, self.unit)

    def __str__(self) -> str:
        spent, reserved = self.shown(self.spent), self.shown(self.reserved)
        return f"{self.shown(self.cap)} ({spent} spent, {reserved} reserved)"

    def __repr__(self) -> str:
        return f"Budget({self.cap!r}, {self.unit!r})"


def shown_amount(amount: float, unit: Unit) -> str:
    """Return an amount as text, with the unit.

    :param amount: the amount.
    :param unit: its unit.

    >>> shown_amount(1.5, "dollars"), shown_amount(0.5, "dollars"), shown_amount(0.000072, "dollars")
    ('$1.50', '$0.50', '$0.000072')
    >>> shown_amount(1200, "tokens")
    '1,200 tokens'
    """
    if unit == "tokens":
        return f"{amount:,.0f} tokens"
    if amount >= 1 or amount < _ROUNDING:  # sums of fractions leave less than that
        return f"${amount:,.2f}"
    whole, _, cents = f"{amount:.{2 - math.floor(math.log10(amount))}f}".partition(".")
    return f"${whole}.{cents.rstrip('0'):0<2}"
