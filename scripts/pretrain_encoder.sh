#!/usr/bin/env bash
# Pretrain the small vision encoder of the embedded default: SigLIP's image-text loss on captioned scenes.
#
#   bash scripts/pretrain_encoder.sh [key=value ...]
#
#   config=tiny_encoder    a name in quickstart/configs, or a YAML file
#   output=runs/encoder    run directory; the model is in output/model
#   sprites=shapes         shapes or emoji
#   nproc, nnodes, zero    processes (default: GPUs, or 1), nodes (1), DeepSpeed ZeRO stage (0-3, default the config's)
#   any.key=value          of the configuration, such as optimization.max_steps=100
#
# The same command resumes an interrupted run. Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
config=tiny_encoder package=quickstart zero_keys=optimization.zero
read_arguments "$@"
install_for_training
rename output=output_dir
launch vqrae.quickstart.pretrain_encoder
