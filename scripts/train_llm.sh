#!/usr/bin/env bash
# Train the small language model of the embedded default on the language of the scenes.
#   bash scripts/train_llm.sh [config=tiny_llm] [output=runs/llm] [key=value ...]
# The same command resumes. Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
launch quickstart.train_llm "$@"
