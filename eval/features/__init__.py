"""What the continuous features hold, by probes."""
