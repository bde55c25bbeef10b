#!/usr/bin/env bash
# Install, then run the whole pipeline on the embedded scenes, on any machine, and write a report.
#
#   bash scripts/quickstart.sh [--minutes M] [--system vqrae|unitok]
#
# Encoder, tokenizer, understanding, generation and all evaluations; the report is runs/quickstart/report.html or .md.
# The same command continues where it was interrupted.
. "$(dirname "$0")/lib.sh"
case "${1:-}" in -h | --help) usage && exit 0 ;; esac
install
exec "$PYTHON" -m vqrae.scripts.quickstart "$@"
