#!/usr/bin/env bash
# Name images without training for it (top-1, top-5) and retrieve images and captions (recall at 1, 5, 10), by continuous
# and by quantized features.
#   bash scripts/eval_zeroshot.sh [model=runs/tokenizer] [data=scenes] [class_names=FILE] [text_model=SIGLIP] [key=value ...]
# data= may be a folder whose sub-folders are classes (ImageNet), or captioned images. docs/evaluation.md
. "$(dirname "$0")/lib.sh"
launch eval.zeroshot.evaluate "$@"
