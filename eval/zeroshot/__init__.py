"""Zero-shot classification and retrieval with the text side of a tokenizer."""
