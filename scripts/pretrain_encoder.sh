#!/usr/bin/env bash
# Pretrain the small vision encoder of the embedded default: SigLIP's image-text loss on captioned scenes.
#   bash scripts/pretrain_encoder.sh [config=tiny_encoder] [output=runs/encoder] [sprites=shapes] [key=value ...]
# The same command resumes. Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
launch quickstart.pretrain_encoder "$@"
