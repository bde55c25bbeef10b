#!/usr/bin/env bash
# Score a tokenizer's reconstructions: rFID, Inception score, PSNR, SSIM, LPIPS, codebook usage.
#   bash scripts/eval_reconstruction.sh [model=runs/tokenizer] [data=scenes] [num_images=N] [protocol=standard] [key=value ...]
# rFID and LPIPS need weights that cannot be shipped; without them the report names the file to get. docs/evaluation.md
. "$(dirname "$0")/lib.sh"
launch eval.reconstruction.evaluate "$@"
