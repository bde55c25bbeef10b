#!/usr/bin/env bash
# Turn captioned images into code shards, once, so that training the generator never runs the tokenizer.
#   bash scripts/extract_codes.sh [config=tiny] [tokenizer=RUN] [data=scenes] [output=runs/codes] [size=N] [key=value ...]
# The same command continues after the shards that are written. docs/generation.md; paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
launch generation.extract_codes "$@"
