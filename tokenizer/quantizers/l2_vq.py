"""VQ on the unit sphere (ViT-VQGAN, arXiv 2110.04627; LlamaGen): the nearest code is the one of largest cosine."""

from torch import Tensor, nn

from vqrae.tokenizer.quantizers.vq import VQ


class L2VQ(VQ):
    """Features and table are normalised, and so is what the decoder gets."""

    equals_vq = False

    def table(self) -> Tensor:
        return self.to_code_space(self.codebook)

    def to_code_space(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(features, dim=-1)
