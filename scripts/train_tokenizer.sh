#!/usr/bin/env bash
# Train the visual tokenizer: quantizer and decoder on a frozen encoder (stage 1), then all together (stage 2).
#   bash scripts/train_tokenizer.sh [config=tiny] [stage=1|2|both] [data=scenes] [encoder=runs/encoder] [key=value ...]
# config is siglip2_256, siglip2_512, internvit_448, unitok, unitok_tiny, photographs or a YAML file;
# dry_run=N says what it needs. The same command resumes. Sources of data are in docs/data.md, the rest in
# docs/tokenizer.md. Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
launch tokenizer.train "$@"
