"""Look into a store, write its answers for other programs, and delete from it."""
