from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizer_trainings import quick_statistics, train
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


@pytest.fixture(autouse=True, scope="module")
def _quick_statistics() -> Iterator[None]:
    with quick_statistics():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of both stages with everything; not to be changed."""
    output = tmp_path_factory.mktemp("finished")
    train(output)
    return output
