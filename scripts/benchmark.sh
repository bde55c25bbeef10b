#!/usr/bin/env bash
# Speed and memory of our hot paths beside the usual way: ours and the reference in alternation, results checked for equality.
#
#   bash scripts/benchmark.sh [NAME ...]
#
#   NAME   a module of benchmarks/; without one, all of them
#
# Prints a table and writes runs/benchmarks/NAME.json; a ratio above 1 means that ours is better.
. "$(dirname "$0")/lib.sh"
case "${1:-}" in -h | --help) usage && exit 0 ;; esac
install
exec "$PYTHON" -m vqrae.benchmarks "$@"
