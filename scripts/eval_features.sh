#!/usr/bin/env bash
# Probe a tokenizer's features, continuous and quantized, after each stage: cosine with the original encoder, nearest
# neighbours, linear probe.
#   bash scripts/eval_features.sh [model=runs/tokenizer] [data=scenes] [test_data=FOLDER] [key=value ...]
# data= may be a folder whose sub-folders are classes. docs/evaluation.md
. "$(dirname "$0")/lib.sh"
launch eval.features.evaluate "$@"
