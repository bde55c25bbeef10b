"""The commands of `vqrae`: dataclasses of their options, each with a method `run`."""
