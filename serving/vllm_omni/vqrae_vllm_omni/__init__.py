"""Generators of vqrae in vLLM-Omni: language model with guidance, then codes to pixels."""
