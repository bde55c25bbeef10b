"""A GPU that does not exist: our real code on `cuda` tensors that have a shape but no content.

    with fake_gpu() as gpu:
        model(images.to("cuda")).sum().backward()
    gpu.peak_bytes, gpu.flops

`cuda` tensors are torch's FakeTensors: shape, type and device, so a model of full size costs
nothing, and tensors on two devices do not mix. CPU tensors are real, up to a size that only weights
exceed. Values that are read back are made up: numbers are 1, truths false, tensors zero, and a
search for elements finds one (that of a mask from the host, as many as it has). Questions to the
driver are answered, so that our code takes its own paths for a GPU.

Two more things need a driver and are replaced: `backward` walks torch's graph node by node (without
the hooks of tensors and gradients), and modules get new parameters when they move.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import transformers.utils.import_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vqrae.planning.backward import backward, grad

GIB = 2**30
aten = torch.ops.aten


def _unique(x: Tensor, inverse: bool, counts: bool) -> tuple[Tensor, Tensor, Tensor]:
    places = x.new_empty(x.shape if inverse else (0,), dtype=torch.int64)
    return x.new_empty(1), places, x.new_empty(int(counts), dtype=torch.int64)


# A GPU answers these with as many numbers as there are elements that fit; the host waits for them.
SEARCHES: dict[Any, Callable[..., Any]] = {
    aten.nonzero.default: lambda x: x.new_empty((1, x.ndim), dtype=torch.int64),
    aten.masked_select.default: lambda x, mask: x.new_empty(1),
    aten.unique_consecutive.default: lambda x, inverse=False, counts=False, dim=None: _unique(
        x, inverse, counts
    ),
    aten._unique2.default: lambda x, sort=True, inverse=False, counts=False: _unique(
        x, inverse, counts
    ),
    aten.bincount.default: lambda x, weights=None, minlength=0: x.new_empty(
        max(1, minlength), dtype=torch.int64
    ),
    aten.repeat_interleave.Tensor: lambda x, output_size=None: x.new_empty(output_size or 1),
    aten.equal.default: lambda x, y: True,
    aten.linalg_lstsq.default: lambda a, b, *how, **driver: (
        b.new_empty(a.shape[-1], b.shape[-1]),
        *b.new_empty(3, 0),
    ),
}
# The host looks whether these succeeded.
SOLVERS = {aten._linalg_eigh.default, aten._linalg_svd.default, aten.linalg_inv_ex.default}
INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._unsafe_index_put.default,
}


class FakeGPU(TorchDispatchMode):
    """The device.

    Args:
        fake: makes the tensors without content.
        host_limit: CPU tensors of more elements than this are made without content as well.

    Attributes:
        used_bytes, peak_bytes: of all tensors on the device, now and at most.
        flops: of all products and convolutions so far.
        marks: `flops` at each `torch.cuda.synchronize`.
    """

    def __init__(self, fake: FakeTensorMode, host_limit: float = math.inf) -> None:
        super().__init__()
        self.fake, self.host_limit = fake, host_limit
        self.used_bytes = self.peak_bytes = self.flops = 0
        self.marks: list[int] = []
        self._storages: dict[int, Any] = {}

    def note(self, kind: str) -> None:
        """The host waited for the device."""

    def synchronize(self, device: Any = None) -> None:
        """What `torch.cuda.synchronize` does."""
        self.note("synchronize")
        self.marks.append(self.flops)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = self._run(func, args, kwargs or {})
        on_gpu = [tensor for tensor in tree_leaves(result) if is_on_gpu(tensor)]
        for tensor in on_gpu:
            self._count(tensor.untyped_storage())
        if on_gpu and func._overloadpacket in flop_registry:
            count = flop_registry[func._overloadpacket]
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def free(_: Any) -> None:
            self.used_bytes -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, free)
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        # In inference mode autograd does not take apart operations that are made of others.
        if torch.is_inference_mode_enabled():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        on_host = torch.device(kwargs.get("device") or "cpu").type != "cuda"
        if on_host and not _any_fake((*args, *kwargs.values())) and not self._is_large(args):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in SEARCHES:
            if not (func is aten.repeat_interleave.Tensor and kwargs.get("output_size")):
                self.note(func.name())
            return SEARCHES[func](*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.note(f"{args[0].dtype} read")
            if args[0].dtype == torch.bool:
                return False
            return 1.0 if args[0].is_floating_point() else 1
        if func in (aten._to_copy.default, aten.copy_.default):
            return self._copy(func, args, kwargs)
        if func in INDEXING:
            args = (args[0], self._found(args[1]), *args[2:])
        if func in SOLVERS:
            self.note(func.name())
        return func(*args, **kwargs)

    def _is_large(self, args: tuple) -> bool:
        """Whether a factory, whose first argument is a shape, makes a tensor above the limit."""
        shape = args[0] if args and isinstance(args[0], list | tuple) else ()
        numbers = all(isinstance(size, int) for size in shape)
        return numbers and math.prod(shape) > self.host_limit

    def _copy(self, func: Any, args: tuple, kwargs: dict) -> Any:
        new = func is aten._to_copy.default
        source = args[0] if new else args[1]
        target = torch.device(kwargs.get("device") or source.device) if new else args[0].device
        dtype = (kwargs.get("dtype") or source.dtype) if new else args[0].dtype
        if is_on_gpu(source) and target.type == "cpu":
            self.note(f"copy {tuple(source.shape)} to the host")
            if source.numel() > self.host_limit:
                return func(*args, **kwargs)
            with unset_fake_temporarily():
                zeros = torch.zeros(source.shape, dtype=dtype)
                return zeros if new else args[0].copy_(zeros)
        if not is_on_gpu(source) and target.type == "cuda" and source.numel():
            non_blocking = kwargs.get("non_blocking") or (not new and len(args) > 2 and args[2])
            if why := _why_blocking(source, dtype, bool(non_blocking)):
                self.note(f"copy {tuple(source.shape)} {source.dtype} to the device, {why},")
        result = func(*args, **kwargs)
        if source.dtype == torch.bool and not _any_fake((source,)):
            with unset_fake_temporarily():
                result.number_found = int(source.sum())
        return result

    def _found(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Indices, with masks replaced by the places that a search in them finds."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8) and is_on_gpu(index):
                self.note(f"indexed by a mask {tuple(index.shape)}")
                number = getattr(index, "number_found", 1)
                found += [index.new_empty(number, dtype=torch.int64) for _ in range(index.ndim)]
            else:
                found.append(index)
        return found


def is_on_gpu(value: Any) -> bool:
    """Whether a value is a tensor of the fake device."""
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


def _why_blocking(source: Tensor, dtype: torch.dtype, non_blocking: bool) -> str:
    """Why the host waits for a copy to the device; empty where it does not."""
    if not source.is_pinned():
        return "from pageable memory"
    if dtype != source.dtype:
        return "converted on the host"
    return "" if non_blocking else "blocking"


def _any_fake(values: Sequence[Any]) -> bool:
    return any(isinstance(value, FakeTensor) for value in tree_leaves(values))


# ---- what needs a driver


class Generator(torch.Generator):
    """A random generator that may be one of the fake device."""

    def __new__(cls, device: Any = "cpu") -> Any:
        generator: Any = super().__new__(cls)
        generator.place = torch.device(device)
        return generator

    device: Any = property(lambda self: self.place)


_real_attention = nn.functional.scaled_dot_product_attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that CUDA chooses: flash attention, or the efficient one for masks and fp32."""
    if not is_on_gpu(query):
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return _real_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = zeros.masked_fill(attn_mask.logical_not(), -math.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    efficient = aten._scaled_dot_product_efficient_attention
    trains = torch.is_grad_enabled()
    return efficient(query, key, value, attn_mask, trains, dropout_p, is_causal, scale=scale)[0]


def _move(
    module: nn.Module,
    function: Callable[[Tensor], Tensor],
    recurse: bool = True,
    *,
    moved: Any = None,
) -> nn.Module:
    """`nn.Module._apply` that never changes a tensor in place; shared parameters stay shared."""
    moved = {} if moved is None else moved
    for child in module.children():
        _move(child, function, moved=moved)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if id(parameter) not in moved:
            with torch.no_grad():
                new = function(parameter)
            if new is not parameter:
                new = nn.Parameter(new.detach(), requires_grad=parameter.requires_grad)
            moved[id(parameter)] = (parameter, new)  # the old one stays alive, and so does its id
        module._parameters[name] = moved[id(parameter)][1]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


class _Properties:
    name = "fake GPU"
    major, minor = 9, 0  # of an H100, so that bf16 and its kernels are taken
    total_memory, multi_processor_count = 80 * GIB, 132


def _driver(gpu: FakeGPU, count: int) -> dict[str, Any]:
    """Answers of `torch.cuda`."""
    state = torch.zeros(16, dtype=torch.uint8)
    nothing = lambda *args, **options: None  # noqa: E731
    silent = "set_device set_rng_state set_rng_state_all manual_seed manual_seed_all empty_cache"
    return dict.fromkeys([*silent.split(), "_lazy_init", "reset_peak_memory_stats"], nothing) | {
        "is_available": lambda: count > 0,
        "is_initialized": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "synchronize": gpu.synchronize,
        "is_bf16_supported": lambda *args, **options: True,
        "get_device_name": lambda device=None: _Properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: _Properties,
        "get_rng_state": lambda device=None: state,
        "get_rng_state_all": lambda: [state] * count,
        "memory_allocated": lambda device=None: gpu.used_bytes,
        "max_memory_allocated": lambda device=None: gpu.peak_bytes,
        "max_memory_reserved": lambda device=None: gpu.peak_bytes,
        "mem_get_info": lambda device=None: (70 * GIB, 80 * GIB),
    }


def _pinned(tensor: Tensor, device: Any = None) -> Tensor:
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    tensor.is_pinned = lambda device=None: True  # type: ignore[method-assign]
    return tensor


_data_ptr = torch.UntypedStorage.data_ptr


def _storage_address(storage: torch.UntypedStorage) -> int:
    return _data_ptr(storage) if storage.device.type == "cpu" else storage._cdata


def _reduce(tensor: Tensor, protocol: Any) -> Any:
    return tensor.detach().cpu().__reduce_ex__(protocol)


def _address(tensor: Tensor) -> Any:
    return tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size()


@contextlib.contextmanager
def fake_gpu(
    count: int = 1, kind: type[FakeGPU] = FakeGPU, *, host_limit: float = math.inf
) -> Iterator[Any]:
    """A machine with `count` GPUs; yields the device, a `kind`."""
    torch._C._ensureCUDADeviceGuardSet()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    gpu = kind(fake, host_limit)

    def check(error: type[Exception], condition: Tensor, message: Any = None) -> None:
        if is_on_gpu(condition):
            gpu.note("a check")
        elif not condition.all():
            raise error(message() if callable(message) else message)

    with contextlib.ExitStack() as stack:

        def put(place: Any, **answers: Any) -> None:
            stack.enter_context(mock.patch.multiple(place, **answers))

        driver = _driver(gpu, count)
        put(torch.cuda, **driver)
        random = [name for name in driver if "rng_state" in name or "seed" in name]
        put(torch.cuda.random, **{name: driver[name] for name in random})
        put(FakeTensorMode, avoid_device_init=True)
        put(
            torch.accelerator,
            is_available=driver["is_available"],
            device_count=driver["device_count"],
            current_device_index=driver["current_device"],
        )
        put(torch.cuda.amp.common, amp_definitely_not_available=lambda: False)
        put(torch.autograd, backward=backward, grad=grad)
        put(nn.Module, _apply=_move)
        put(Tensor, pin_memory=_pinned)
        put(FakeTensor, data_ptr=_address, __reduce_ex__=_reduce)
        put(torch.UntypedStorage, data_ptr=_storage_address)
        put(torch, _check_tensor_all_with=check, Generator=Generator)
        put(nn.functional, scaled_dot_product_attention=_attention)
        # transformers does not ask traced tensors the questions that it asks others.
        put(transformers.utils.import_utils, is_fake_tensor=lambda tensor: False)
        _forget_device()
        stack.callback(_forget_device)
        stack.enter_context(fake)
        stack.enter_context(gpu)
        yield gpu


def _forget_device() -> None:
    """`accelerate` and `transformers` ask once and remember."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import imports

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    for function in (*vars(imports).values(), *vars(transformers.utils.import_utils).values()):
        if hasattr(function, "cache_clear") and "available" in function.__name__:
            function.cache_clear()
