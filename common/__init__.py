"""Leaves that every package may import: configuration, runs, processes, files, images."""
