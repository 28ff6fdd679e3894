"""Passes for Feste: leave spare white space out of prompts, or tell what that would save."""
