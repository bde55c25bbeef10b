"""Next-token prediction on the tokenizer's codes with Qwen3: vocabulary, extraction, training, sampling."""
