"""What a program of the chaos suite is to do, and what each of its calls asks.

The program and the checker make the same work from the same few words, so that the checker knows
what each answer had to be without asking the program.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["POISON", "Shape", "Step", "make"]

#: A prompt that has this word is refused by the provider, each time.
POISON = "poison"

Shape = Literal["flat", "chains", "layers", "graphs"]


@dataclass(frozen=True, slots=True)
class Step:
    """One call.

    :param text: what it says itself.
    :param parents: the numbers of the calls whose answers its prompt contains.
    """

    text: str
    parents: tuple[int, ...] = ()

    def prompt(self, answers: Sequence[Any]) -> str:
        """Return the whole prompt.

        :param answers: the answers of all calls, or of those before this one.
        """
        return "\n".join([self.text, *(str(answers[parent]) for parent in self.parents)])


def make(
    shape: Shape, calls: int, seed: int, *, equal: int = 2, poisoned: float = 0.0
) -> list[Step]:
    """Return the calls, each after those that it needs.

    ``"flat"`` calls need no other; ``"chains"`` are of four calls, each needing the one before;
    ``"layers"`` are four of four calls, each needing one to three of the layer before; ``"graphs"``
    are of 20 calls, each needing up to three random ones before.

    :param shape: the shape.
    :param calls: how many calls.
    :param seed: of what is random.
    :param equal: how many calls without parents have the same prompt: they are draws of their own.
    :param poisoned: the share of calls that the provider refuses.
    """
    chance = random.Random(seed)
    size = {"flat": 1, "chains": 4, "layers": 16, "graphs": 20}[shape]
    steps = []
    for i in range(calls):
        first = i - i % size
        if shape == "graphs":
            before = range(first, i)
            parents = chance.sample(before, min(len(before), chance.randint(0, 3)))
        elif shape == "layers":
            layer = i - (i - first) % 4
            above = range(max(first, layer - 4), layer)
            parents = chance.sample(above, chance.randint(1, 3)) if above else []
        else:
            parents = [i - 1] if i > first else []
        text = f"step {i}" if parents else f"start {i // size // equal} of {i % size}"
        if chance.random() < poisoned:
            text = f"{POISON} {i}"
        steps.append(Step(text, tuple(parents)))
    return steps
