"""The hands of this machine: they do the work that the brain decides on, and report back."""
