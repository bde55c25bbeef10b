#!/usr/bin/env bash
# Install, then run the whole pipeline on the embedded scenes, on any machine, and write a report.
#
#   bash scripts/quickstart.sh [--minutes M] [--sprites shapes|emoji] [--output DIR]
#
#   --minutes M        training time on two CPU cores (default: 12)
#   --sprites NAME     what the scenes are made of: shapes, or emoji (Twemoji artwork)
#   --output DIR       default: runs/quickstart
#
# Encoder, tokenizer, understanding, generation, all evaluations; the report is DIR/report.html.
# The same command continues where it was interrupted.
. "$(dirname "$0")/lib.sh"
case "${1:-}" in -h | --help) usage && exit 0 ;; esac
install
exec "$PYTHON" -m vqrae.quickstart.pipeline "$@"
