"""One file per quantizer; `registry` lists them by name."""
