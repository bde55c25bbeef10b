#!/usr/bin/env bash
# Install, lint, check types, run the tests.
#   bash scripts/test.sh [pytest options, such as tests/data or -k tar]
. "$(dirname "$0")/lib.sh"
install dev deepspeed
[ -z "$help" ] || exit 0

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# mypy cannot follow the import hook of an editable install; a folder of links shows it the same packages.
mkdir -p build/types/vqrae
packages=(common data tokenizer understanding generation mllm eval planning quickstart demo scripts)
for package in "${packages[@]}"; do ln -sfn "$PWD/$package" "build/types/vqrae/$package"; done
MYPYPATH=build/types:.:serving/vllm_omni "$PYTHON" -m mypy "${packages[@]/#/-pvqrae.}" -p benchmarks -p vqrae_vllm_omni
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$PYTHON" -m pytest -q -n 2 --dist loadfile --durations=5 "$@"
