"""Leaves that every package may import: configuration, run directories, distributed helpers, images."""
