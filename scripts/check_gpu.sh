#!/usr/bin/env bash
# Is everything right on this GPU, and how fast is it? Each hot path is compared with the CPU, then timed, with random weights
# and without a network; about five minutes on one large GPU.
#
#   bash scripts/check_gpu.sh [only=TEXT] [minutes=5] [output=runs/check_gpu.json]
#
#   only      rows whose name holds this, such as `tokenizer siglip2_256`, `search`, `LLaVA`, `generator`, `sampler`
#   minutes   rows that would begin later are left out
#   output    the same table as JSON
. "$(dirname "$0")/lib.sh"
case "${1:-}" in -h | --help) usage && exit 0 ;; esac
install
exec "$PYTHON" -m vqrae.benchmarks.check_gpu "$@"
