#!/usr/bin/env bash
# Train the small language model of the embedded default on the language of the scenes.
#
#   bash scripts/train_llm.sh [key=value ...]
#
#   config=tiny_llm        a name in quickstart/configs, or a YAML file
#   output=runs/llm        run directory; the model is in output/model
#   nproc, nnodes, zero    processes (default: GPUs, or 1), nodes (1), DeepSpeed ZeRO stage (0-3, default the config's)
#   any.key=value          of the configuration, such as optimization.max_steps=100
#
# The same command resumes an interrupted run. Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
config=tiny_llm package=quickstart zero_keys=optimization.zero
read_arguments "$@"
install_for_training
rename output=output_dir
launch vqrae.quickstart.train_llm
