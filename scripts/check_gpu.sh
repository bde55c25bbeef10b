#!/usr/bin/env bash
# Is everything right on this GPU, and how fast is it? Each hot path is compared with the CPU, then timed.
#   bash scripts/check_gpu.sh [only=TEXT] [minutes=5] [output=runs/check_gpu.json]
# Random weights, no network; about five minutes on one large GPU. docs/performance.md
. "$(dirname "$0")/lib.sh"
install
exec "$PYTHON" -m benchmarks.check_gpu "$@"
