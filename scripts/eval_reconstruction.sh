#!/usr/bin/env bash
# Score a tokenizer's reconstructions: PSNR, SSIM, codebook usage.
#
#   bash scripts/eval_reconstruction.sh [key=value ...]
#
#   model=runs/tokenizer                         run directory, checkpoint folder or hub id; made first when there is none
#   data=scenes                                  scenes, scenes:emoji, a folder of pictures, FILE.jsonl, FILE.tar
#   num_images=1000                              pictures to score
#   output=runs/evaluation/reconstruction.json   where the scores go
#
# Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
config="" nproc=1
read_arguments "$@"
install
artefact model tokenizer train_tokenizer.sh
defaults data=scenes num_images=1000 output=runs/evaluation/reconstruction.json
launch vqrae.eval.reconstruction
