"""Calls that share requests: waiting for each other, packing, unpacking, and resending in parts."""
