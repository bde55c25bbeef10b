#!/usr/bin/env bash
# The paper's central claim on scenes: LLaVA on original, distilled, undistilled and quantized features, in one table.
#   bash scripts/compare_features.sh [tokenizer=runs/tokenizer] [llm=runs/llm] [seeds=[0]] [training=[sft.max_steps=500]]
# About an hour for each seed with 400 steps of sft on one EPYC core. The same command continues. docs/understanding.md
. "$(dirname "$0")/lib.sh"
launch quickstart.compare_features "$@"
