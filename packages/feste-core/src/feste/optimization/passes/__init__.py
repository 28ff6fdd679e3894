"""Feste's own optimization passes, one file each."""
