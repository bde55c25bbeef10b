#!/usr/bin/env bash
# Score a tokenizer's reconstructions: rFID, Inception score, PSNR, SSIM, LPIPS, codebook usage.
#
#   bash scripts/eval_reconstruction.sh [key=value ...]
#
#   model=runs/tokenizer                         run directory, checkpoint folder or hub id; made first when there is none
#   data=scenes                                  scenes, scenes:emoji, a folder of images, FILE.jsonl, FILE.tar
#   split=auto                                   all or validation; auto: all of files, the held-out part of scenes
#   num_images=                                  images to score; else 1000 scenes, or everything that files hold
#   protocol=standard                            standard, titok, vgt, maskbit, llamagen, rae
#   frechet=[inception]                          inception (rfid), efficientnet_lite0, encoder
#   reference=FOLDER                             keeps statistics of the originals for the next run
#   output=runs/evaluation/reconstruction.json   where the scores go; a .md table and a .png of examples beside it
#   nproc=N                                      processes; the numbers do not depend on it
#
# rFID and LPIPS need weights that cannot be shipped; without them they are reported as not measured, with the file to get.
# Paths are relative to the repository; all keys: python -m vqrae.eval.reconstruction.evaluate --help
. "$(dirname "$0")/lib.sh"
config=""
read_arguments "$@"
install
artefact model tokenizer train_tokenizer.sh
defaults output=runs/evaluation/reconstruction.json
launch vqrae.eval.reconstruction.evaluate
