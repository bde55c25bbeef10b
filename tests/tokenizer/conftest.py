import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestResult(TorchDispatchMode):
    """Watches how many numbers the largest result of any operation holds."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if (
                isinstance(tensor, Tensor)
                and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize
            ):
                self.size = max(self.size, tensor.numel())
        return result


@pytest.fixture
def largest_result() -> LargestResult:
    return LargestResult()


@pytest.fixture(scope="session")
def tiny_run() -> list[str]:
    """Arguments of the tiny configuration with a random encoder of two layers, for trainings of a few steps."""
    encoder = (
        "{model_type: siglip_vision_model, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,"
        " num_attention_heads: 2, image_size: 64, patch_size: 8, vision_use_head: false}"
    )
    arguments = [
        "tiny",
        "model.encoder=",
        f"model.encoder_config={encoder}",
        "model.codebook_size=64",
        "model.codebook_dim=32",
    ]
    return [
        *arguments,
        "stage1.revival_interval=0",
        "stage2.revival_interval=0",
        "stage2.bypass_steps=0",
    ]
