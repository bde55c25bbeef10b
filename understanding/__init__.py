"""Visual understanding: LLaVA-1.5 on the tokenizer's continuous features."""
