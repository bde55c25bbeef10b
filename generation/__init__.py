"""Next-token prediction on codes with Qwen3: vocabulary, extraction, training, sampling."""
