"""Speed and memory of our hot paths beside the usual way: one module per name, each with `run() -> list[Row]`."""
