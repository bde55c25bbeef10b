#!/usr/bin/env bash
# Speed and memory of our hot paths vs the usual way, in alternation, results checked for equality.
#   bash scripts/benchmark.sh [NAME ...]
# NAME is a file of benchmarks/; all by default. A ratio above 1 means that ours is better; runs/benchmarks/NAME.json
. "$(dirname "$0")/lib.sh"
install
exec "$PYTHON" -m benchmarks "$@"
