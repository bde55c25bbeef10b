#!/usr/bin/env bash
# Score a generator on dense prompts: a judge answers questions about its images (DPG-Bench).
#
#   bash scripts/eval_dpg.sh [key=value ...]
#
#   model=runs/generation            draw with this generator; made first when there is none
#   images=FOLDER                    score images that anybody drew instead: ITEM.png for each prompt
#   images_per_prompt=1            of images=: 1 for single images, 4 for 2 x 2 grids
#   questions=scenes                 scenes, or DPG-Bench's dpg_bench.csv (not shipped; the error says where it is)
#   judge=scenes                     mplug (the official one), vqa, chat, endpoint, understanding, scenes
#   judge_model=MODEL judge_url=URL  of the judge
#   official_compat=true             the published script's formulas, faults included, to compare with old numbers
#   out=runs/evaluation/dpg          where everything goes
#   nproc=N                          processes; the numbers do not depend on it
#
# Paths are relative to the repository. All keys: python -m vqrae.eval.dpg_bench.evaluate --help; docs/text_to_image_evaluation.md
. "$(dirname "$0")/lib.sh"
config="" nproc=1
read_arguments "$@"
if [ "$(given judge || true)" = mplug ]; then install mplug; else install; fi
given images >/dev/null || artefact model generation train_ar_gen.sh
defaults out=runs/evaluation/dpg
launch vqrae.eval.dpg_bench.evaluate
