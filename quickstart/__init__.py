"""The embedded world: everything from nothing on one CPU."""
