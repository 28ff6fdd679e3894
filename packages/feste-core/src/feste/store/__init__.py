"""Stores: files that keep paid answers, so that a rerun buys only the rest.

The setting ``store`` names the file; ``feste store`` on the command line looks into it.
"""

from feste.store.opened import close

__all__ = ["close"]
