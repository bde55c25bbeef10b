#!/usr/bin/env bash
# Turn captioned images into code shards, once, so that training the generator never runs the tokenizer.
#
#   bash scripts/extract_codes.sh [key=value ...]
#
#   config=tiny                a name in generation/configs, or a YAML file
#   tokenizer=runs/tokenizer   run directory, checkpoint folder or hub id; made first when there is none
#   data=scenes                scenes, emoji, FILE.jsonl, FILE.tar (or a glob), hf:NAME, A*0.5+B*0.5 (docs/data.md)
#   output=runs/codes          folder of the shards
#   size=N                     images to take (default the config's; size=null takes all)
#   nproc, nnodes              processes (default: GPUs, or 1), nodes (1)
#   key=value                  of the configuration's section `extraction`
#
# The same command continues after the shards that are there; `vqrae check-data FOLDER` compares all of them with their checksums. Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
package=generation section=extraction.
read_arguments "$@"
install
rename data=source output=output_dir
artefact tokenizer tokenizer train_tokenizer.sh
launch vqrae.generation.extract_codes
