#!/usr/bin/env bash
# Score a generator by GenEval 2: how surely a judge finds every atom of a prompt in its image (Soft-TIFA).
#   bash scripts/eval_geneval2.sh [model=runs/generation | images=FILE.json] [prompts=scenes|FILE.jsonl] [judge=scenes|chat|endpoint]
# Results go to output=runs/evaluation/geneval2. docs/text_to_image_evaluation.md
. "$(dirname "$0")/lib.sh"
launch eval.geneval2.evaluate "$@"
