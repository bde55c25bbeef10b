"""The visual tokenizer: configuration, model, quantizers, losses and training."""
