#!/usr/bin/env bash
# Score a generator on dense prompts: a judge answers questions about its images (DPG-Bench).
#   bash scripts/eval_dpg.sh [model=runs/generation | images=FOLDER] [questions=scenes|FILE.csv] [judge=scenes|mplug|...]
# Results go to output=runs/evaluation/dpg. docs/text_to_image_evaluation.md
. "$(dirname "$0")/lib.sh"
launch eval.dpg_bench.evaluate "$@"
