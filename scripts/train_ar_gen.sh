#!/usr/bin/env bash
# Train the generator: next-token prediction of the tokenizer's codes, after a caption.
#   bash scripts/train_ar_gen.sh [config=tiny] [tokenizer=RUN] [data=CODES] [output=runs/generation] [key=value ...]
# config is qwen3_0_6b or a YAML file; data may be captioned images too; dry_run=N says what it needs. The same command
# resumes. docs/generation.md has the rest. Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
launch generation.train "$@"
