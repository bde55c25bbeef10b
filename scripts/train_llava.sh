#!/usr/bin/env bash
# Train LLaVA-1.5 on the tokenizer's continuous features: the projector (pretrain), then projector and LLM (sft).
#
#   bash scripts/train_llava.sh [key=value ...]
#
#   config=tiny                tiny, smollm2, vicuna_7b, vicuna_13b, qwen2_5_7b (a name in understanding/configs), or a YAML file
#   stage=both                 pretrain, sft or both
#   tokenizer=runs/tokenizer   run directory, checkpoint folder or hub id; made first when there is none
#   llm=runs/llm               language model: folder or hub id; made (smollm2: fetched) first when there is none
#   data=scenes                conversations: scenes, scenes:emoji, FILE.json in LLaVA's format, hf:FILE.parquet, A*0.5+B*0.5
#   image_folder=FOLDER        where the images of FILE.json lie (default: beside it)
#   pretrain_data=DATA         captions or conversations of the first stage, where they are not the same
#   pretrain_image_folder=DIR  where the images of pretrain_data lie
#   batching=random            random, grouped (LLaVA's, by modality and length) or packed (fastest)
#   lora={}                    train adapters in sft, with LLaVA's settings; lora.rank=64 and others change them
#   projector=FILE             start from LLaVA's mm_projector.bin
#   output=runs/understanding  run directory; the model is in output/model
#   nproc, nnodes, zero        processes (default: GPUs, or 1), nodes (1), DeepSpeed ZeRO stage (0-3, default the config's)
#   any.key=value              of the configuration, such as sft.max_steps=100
#
# The full-size configurations hold Table 8 of the paper; vqrae plan NAME says what they need. global_batch_size stays
# on any number of GPUs, accumulation is computed. The same command resumes an interrupted run. Paths are relative to the
# repository.
. "$(dirname "$0")/lib.sh"
package=understanding zero_keys="pretrain.zero sft.zero"
read_arguments "$@"
install_for_training
rename output=output_dir
lora=$(setting lora)
case "${lora:+ lora} ${arguments[*]-}" in *" lora"*) install lora ;; esac
artefact tokenizer tokenizer train_tokenizer.sh
llm=$(given llm || setting llm)
if [ "$llm" = runs/smollm2 ] && [ ! -f runs/smollm2/model/config.json ]; then
  [ "$nnodes" = 1 ] || fail "runs/smollm2 is not there: first, on one node, run $PYTHON -m vqrae.understanding.smollm2 runs/smollm2"
  install smollm2
  "$PYTHON" -m vqrae.understanding.smollm2 runs/smollm2
fi
artefact llm llm train_llm.sh
launch vqrae.understanding.train
