#!/usr/bin/env bash
# Train UniTok's unified model: one language model that answers questions about images and generates them.
#   bash scripts/train_mllm.sh [config=tiny] [tokenizer=RUN] [llm=FOLDER] [output=runs/mllm] [key=value ...]
# config is unitok_mllm or a YAML file; dry_run=N says what it needs. The same command resumes. docs/mllm.md has the rest.
# Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
launch mllm.train "$@"
