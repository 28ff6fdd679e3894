"""Find what is damaged in a store, and make a new store of all that is good."""
