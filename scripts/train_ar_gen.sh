#!/usr/bin/env bash
# Train the generator: next-token prediction of the tokenizer's codes, after a caption.
#
#   bash scripts/train_ar_gen.sh [key=value ...]
#
#   config=tiny                a name in generation/configs, or a YAML file
#   tokenizer=runs/tokenizer   run directory, checkpoint folder or hub id; made first when there is none
#   data=runs/codes            code shards of that tokenizer, made first (scripts/extract_codes.sh) when there are none; or captioned
#                              images, encoded while training: scenes, emoji, FILE.jsonl, FILE.tar (or a glob), hf:NAME,
#                              CODES*0.7+FILE.tar*0.3 (docs/data.md)
#   output=runs/generation     run directory; the model is in output/model
#   nproc, nnodes, zero        processes (default: GPUs, or 1), nodes (1), DeepSpeed ZeRO stage (0-3, default the config's)
#   dry_run=N                  N steps of the real size with random codes, keeping nothing: parameters, memory, time
#   key=value                  of the configuration's section `training`, such as optimization.max_steps=100
#
# The same command resumes an interrupted run. Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
package=generation section=training. zero_keys=optimization.zero
read_arguments "$@"
install_for_training
rename output=output_dir
if ! given dry_run >/dev/null; then
  artefact tokenizer tokenizer train_tokenizer.sh
  artefact data codes extract_codes.sh tokenizer="$(given tokenizer || setting tokenizer)"
fi
launch vqrae.generation.train
