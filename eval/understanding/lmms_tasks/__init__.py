"""Task files for lmms-eval, and their functions."""
