#!/usr/bin/env bash
# A page in the browser: reconstruct images, ask about them, generate code by code, edit codes. Trains nothing.
#   bash scripts/demo.sh [MODEL ...] [--device cuda] [--port 7860] [--share]
# MODEL is a run directory, a folder of runs, or a hub id; by default runs/quickstart (bash scripts/quickstart.sh makes it). docs/demo.md
. "$(dirname "$0")/lib.sh"
install demo
exec "$PYTHON" -m vqrae.scripts.cli demo "$@"
