#!/usr/bin/env bash
# Train LLaVA-1.5 on the tokenizer's continuous features: the projector (pretrain), then projector and LLM (sft).
#   bash scripts/train_llava.sh [config=tiny] [stage=pretrain|sft|both] [tokenizer=RUN] [llm=MODEL] [data=DATA] [key=value ...]
# config is smollm2, vicuna_7b, vicuna_13b, qwen2_5_7b or a YAML file; lora={} trains adapters. The same command resumes.
# docs/understanding.md has the rest. Paths are relative to the repository.
. "$(dirname "$0")/lib.sh"
launch understanding.train "$@"
