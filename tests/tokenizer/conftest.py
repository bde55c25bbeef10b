import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestResult(TorchDispatchMode):
    """Watches how many numbers the largest result of any operation holds."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize:
                self.size = max(self.size, tensor.numel())
        return result


@pytest.fixture
def largest_result() -> LargestResult:
    return LargestResult()
