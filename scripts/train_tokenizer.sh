#!/usr/bin/env bash
# Train the visual tokenizer: quantizer and decoder on a frozen encoder (stage 1), then all together (stage 2).
#
#   bash scripts/train_tokenizer.sh [key=value ...]
#
#   config=tiny            a name in tokenizer/configs (siglip2_256, siglip2_512, internvit_448), or a YAML file
#   stage=both             1, 2 or both
#   data=scenes            scenes, emoji, a folder, FILE.jsonl, FILE.tar (or a glob), hf:NAME, A*0.5+B*0.5 (docs/data.md)
#   encoder=runs/encoder   pretrained encoder: run directory, checkpoint folder or hub id; made first when there is none
#   output=runs/tokenizer  run directory; the model is in output/model
#   nproc, nnodes, zero    processes (default: GPUs, or 1), nodes (1), DeepSpeed ZeRO stage (0-2, default the config's)
#   micro_batch_size=N     images of one forward pass (default: the config's); accumulation keeps the global batch
#   dry_run=N              N steps of the real size on rendered scenes, keeping nothing: parameters, memory, time
#   any.key=value          of the configuration, such as stage1.max_steps=100
#
# The same command resumes an interrupted run. Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
package=tokenizer zero_keys=zero
read_arguments "$@"
install_for_training
rename encoder=model.encoder data=data.train output=output_dir
artefact model.encoder encoder pretrain_encoder.sh
launch vqrae.tokenizer.train
