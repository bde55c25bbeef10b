"""Scores side by side with those of the paper."""
