"""Speed and memory of our hot paths vs the usual way; run from the repository."""
