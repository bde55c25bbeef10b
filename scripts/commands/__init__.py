"""The commands of `vqrae`, one module a job; each has a `register(commands)`."""
