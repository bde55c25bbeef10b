#!/usr/bin/env bash
# Score an understanding model: on questions about scenes, or on the paper's benchmarks through lmms-eval.
#
#   bash scripts/eval_understanding.sh [key=value ...]
#
#   model=runs/understanding               run directory, model folder or hub id; made first when there is none
#   benchmark=scenes                       scenes with the image and without (blind); or through lmms-eval, which is then
#                                          installed: lmms_scenes (the same questions), paper (all eight), or some of pope,
#                                          gqa, textvqa, textvqa_ocr, mmbench, mme, seedbench, mmmu, ai2d joined by commas
#   output=runs/evaluation/questions.json  where the scores go; a folder (runs/evaluation/understanding) with lmms-eval
#   sprites=shapes                         of scenes: shapes or emoji
#   data=FOLDER                            local parquet files of the benchmarks (docs/understanding.md); else the hub
#   limit=N                                questions of each benchmark, to try it out
#   nproc=1                                processes that share the questions
#
# With lmms-eval, the same command goes on where it stopped, and it fails when lmms-eval does. Paths are relative to the
# repository.
. "$(dirname "$0")/lib.sh"
config="" nproc=1 benchmark=scenes others=()
for argument in "$@"; do
  case "$argument" in
    benchmark=*) benchmark=${argument#*=} ;;
    *) others+=("$argument") ;;
  esac
done
read_arguments ${others[@]+"${others[@]}"}
if [ "$benchmark" = scenes ]; then install; else install eval; fi
artefact model understanding train_llava.sh
if [ "$benchmark" = scenes ]; then
  defaults output=runs/evaluation/questions.json
  launch vqrae.quickstart.scene_questions
fi
arguments+=("benchmark=${benchmark/lmms_scenes/scenes}")
defaults output=runs/evaluation/understanding
launch vqrae.eval.understanding.evaluate
