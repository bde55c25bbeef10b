#!/usr/bin/env bash
# Install, then run the whole pipeline on the embedded scenes, on any machine, and write DIR/report.html.
#   bash scripts/quickstart.sh [--minutes 12] [--system vqrae|unitok] [--sprites shapes|emoji] [--output runs/quickstart]
# Encoder, tokenizer, understanding, generation, all evaluations. The same command continues where it was interrupted.
. "$(dirname "$0")/lib.sh"
install
exec "$PYTHON" -m vqrae.quickstart.pipeline "$@"
