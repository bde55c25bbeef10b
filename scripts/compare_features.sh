#!/usr/bin/env bash
# The paper's central claim on scenes: LLaVA on original, distilled, undistilled and quantized features, in one table.
#
#   bash scripts/compare_features.sh [key=value ...]
#
#   tokenizer=runs/tokenizer       run directory with both stages; made first when there is none
#   llm=runs/llm                   language model: folder or hub id; made first when there is none
#   output=runs/feature_quality    folder of all runs, scores.json and scores.md
#   seeds=[0]                      one model of each kind for each; several say which differences mean something
#   training=[sft.max_steps=500]   changes to the training of the four models
#   nproc=1                        processes of each training and score
#
# Takes about an hour for each seed with 400 steps of sft on one EPYC core, and two with the default's 900. The same command
# goes on where it stopped. Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
config="" nproc=1
read_arguments "$@"
install
artefact tokenizer tokenizer train_tokenizer.sh
artefact llm llm train_llm.sh
defaults output=runs/feature_quality
arguments+=("nproc=$nproc")
nproc=1 # trainings and scores are launched from inside
launch vqrae.quickstart.compare_features
