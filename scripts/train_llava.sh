#!/usr/bin/env bash
# Train LLaVA-1.5 on the tokenizer's continuous features: the projector (pretrain), then projector and LLM (sft).
#
#   bash scripts/train_llava.sh [key=value ...]
#
#   config=tiny                a name in understanding/configs, or a YAML file
#   stage=both                 pretrain, sft or both
#   tokenizer=runs/tokenizer   run directory, checkpoint folder or hub id; made first when there is none
#   llm=runs/llm               language model: folder or hub id; made first when there is none
#   data=scenes                conversations: scenes, scenes:emoji, or FILE.json in LLaVA's format
#   pretrain_data=DATA         captions of the first stage, where they are not the same
#   image_folder=FOLDER        where the pictures of FILE.json lie (default: beside it)
#   output=runs/understanding  run directory; the model is in output/model
#   nproc, nnodes, zero        processes (default: GPUs, or 1), nodes (1), DeepSpeed ZeRO stage (0-3, default the config's)
#   any.key=value              of the configuration, such as sft.max_steps=100
#
# The same command resumes an interrupted run. Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
read_arguments "$@"
install_for_training
rename output=output_dir
defaults output_dir=runs/understanding
artefact tokenizer tokenizer train_tokenizer.sh
artefact llm llm train_llm.sh
launch vqrae.understanding.train pretrain.zero sft.zero
