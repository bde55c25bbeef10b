#!/usr/bin/env bash
# Probe a tokenizer's features, continuous and quantized, after each stage: cosine with the original encoder, nearest
# neighbours, linear probe.
#
#   bash scripts/eval_features.sh [key=value ...]
#
#   model=runs/tokenizer                   run directory, checkpoint folder or hub id; made first when there is none
#   data=scenes                            scenes, scenes:emoji, or a folder whose sub-folders are classes
#   test_data=FOLDER                       test images of the same classes; else every fifth of data=
#   num_train=1000 num_test=500            images to learn from, and to ask about
#   output=runs/evaluation/features.json   where the scores go; a Markdown table beside it
#   nproc=N                                processes; the numbers do not depend on it
#
# Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
config="" nproc=1
read_arguments "$@"
install
artefact model tokenizer train_tokenizer.sh
defaults output=runs/evaluation/features.json
launch vqrae.eval.features.evaluate
