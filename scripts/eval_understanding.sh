#!/usr/bin/env bash
# Score an understanding model on questions about scenes, with the picture and without (blind).
#
#   bash scripts/eval_understanding.sh [key=value ...]
#
#   model=runs/understanding               run directory, model folder or hub id; made first when there is none
#   sprites=shapes                         shapes or emoji
#   output=runs/evaluation/questions.json  where the scores go
#
# Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
config="" nproc=1
read_arguments "$@"
install
artefact model understanding train_llava.sh
defaults output=runs/evaluation/questions.json
launch vqrae.eval.scene_questions
