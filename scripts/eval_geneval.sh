#!/usr/bin/env bash
# Score a generator by GenEval's rules: on prompts about scenes with an exact detector, or on GenEval's own prompts.
#   bash scripts/eval_geneval.sh [model=runs/generation] [sprites=shapes] [key=value ...]                          scenes
#   bash scripts/eval_geneval.sh suite=official [prompts_only=true | model=MODEL | images=FOLDER] [output=FILE.json]  GenEval
# docs/text_to_image_evaluation.md
. "$(dirname "$0")/lib.sh"
launch eval.geneval.evaluate "$@"
