#!/usr/bin/env bash
# Train and score every row of an ablation: codebook dimension and size, training strategy, quantizer (docs/ablations.md).
#
#   bash scripts/ablate.sh [key=value ...]
#
#   suite=all                table5, table6, quantizers, locality, all of them, or a YAML file like those in eval/configs
#   seeds=1                  runs of each row; tables show mean ± half range, and claims need at least two
#   encoder=runs/encoder     pretrained encoder of all runs; made first when there is none
#   data=scenes              scenes, emoji, a folder, FILE.jsonl, FILE.tar (or a glob), hf:NAME (docs/data.md)
#   labelled_data=           scenes or a folder of classes, for probes of features; else data=
#   overrides=[a.b=1,c=2]    of the tokenizer's configuration, for every run
#   output=runs/ablations    folder of the runs and of the tables
#   nproc=N                  processes of each training (default: GPUs, or 1)
#
# The same command resumes: finished runs are not repeated. Paths are relative to the repository; all keys:
# python -m vqrae.eval.ablations.evaluate --help
. "$(dirname "$0")/lib.sh"
config=""
read_arguments "$@"
install
artefact encoder encoder pretrain_encoder.sh
arguments+=("nproc=${nproc:-$(processes)}")
nproc=1 # trainings are launched from inside
launch vqrae.eval.ablations.evaluate
