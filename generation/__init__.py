"""Next-token prediction on the tokenizer's codes with Qwen3: vocabulary, extraction, training, sampling."""

from vqrae.generation.generator import Generator
from vqrae.generation.sampling import SamplingConfig

__all__ = ["Generator", "SamplingConfig"]
