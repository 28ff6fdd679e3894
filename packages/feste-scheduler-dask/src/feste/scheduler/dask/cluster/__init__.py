"""Connect to a cluster: one of the user's, at an address, or one of Feste's own."""
