"""The visual tokenizer: configuration, model, quantizers, losses and training."""

from transformers import AutoConfig

from vqrae.tokenizer.configuration import VQRAEConfig

AutoConfig.register("vqrae", VQRAEConfig)

from vqrae.tokenizer.modeling import VQRAEModel, VQRAEOutput  # noqa: E402  (AutoModel needs the configuration first)

__all__ = ["VQRAEConfig", "VQRAEModel", "VQRAEOutput"]
