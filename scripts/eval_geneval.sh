#!/usr/bin/env bash
# Score a generator by GenEval's rules on prompts about scenes: six families of prompts, checked by an exact detector.
#
#   bash scripts/eval_geneval.sh [key=value ...]
#
#   model=runs/generation                   run directory, model folder or hub id; made first when there is none
#   tokenizer=FOLDER                        its visual tokenizer, where it has moved since training
#   sprites=shapes                          shapes or emoji
#   output=runs/evaluation/generation.json  where the scores go
#   pictures=runs/evaluation/pictures       where the pictures go
#
# Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
config="" nproc=1
read_arguments "$@"
install
artefact model generation train_ar_gen.sh
defaults output=runs/evaluation/generation.json pictures=runs/evaluation/pictures
launch vqrae.eval.generation
