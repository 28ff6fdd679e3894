"""How many cases a fuzz test looks at: few in the short form, 2,000 with ``CHAOS=full``."""

from __future__ import annotations

from hypothesis import settings

#: What the profile of the root's ``conftest.py`` says in the full form.
FULL = 2_000


def cases(short: int, full: int = FULL) -> settings:
    """Return the settings of a test.

    :param short: the cases of the short form.
    :param full: the cases of the full form: fewer where each makes files or starts a run.
    """
    return settings(max_examples=full if settings().max_examples >= FULL else short)
