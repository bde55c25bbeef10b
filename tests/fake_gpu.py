"""A GPU that is not there: our real code on `cuda` tensors without content, watched for what only a GPU would show.

    with fake_gpu() as gpu:
        model = build_model().to("cuda")
        with gpu.no_waiting():  # the host may not wait for the device in here
            model(images).sum().backward()

CPU tensors stay real. `cuda` tensors are torch's FakeTensors: shape, type and device, so that models of full size cost
nothing and tensors on two devices do not mix. What is read back is made up: numbers are 1, truths false, tensors zero, and a
search for elements finds one (that of a mask from the host, as many as it has). Questions to the driver are answered, so
that our code takes its own paths for a GPU.

Two things are replaced beyond that, for they need a driver: `backward` walks torch's graph node by node (without the hooks of
tensors and gradients), and modules get new parameters when they move.
"""

import contextlib
import heapq
import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers.utils.import_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

ROOT, TORCH = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
GIB = 2**30
aten = torch.ops.aten


def _unique(x: Tensor, inverse: bool, counts: bool) -> tuple[Tensor, Tensor, Tensor]:
    number = {"dtype": torch.int64}
    return (
        x.new_empty(1),
        x.new_empty(x.shape if inverse else 0, **number),
        x.new_empty(1 if counts else 0, **number),
    )


# What a GPU answers with as many numbers as there are elements that fit, for which the host has to wait.
SEARCHES = {
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
# The host looks whether these came to an end.
SOLVERS = {aten._linalg_eigh.default, aten._linalg_svd.default, aten.linalg_inv_ex.default}


class FakeGPU(TorchDispatchMode):
    """The device. `waits` lists what made the host wait since it was last cleared, with the line of ours that did."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake, self.waits = fake, list[str]()

    @contextlib.contextmanager
    def no_waiting(self, *allowed: str) -> Iterator[None]:
        """A block in which the host must not wait for the device, but where a part of the note is `allowed`."""
        self.waits.clear()
        yield
        self.check(allowed)

    def check(self, allowed: Sequence[str]) -> None:
        """Fail with what made the host wait, unless it is allowed."""
        found = [wait for wait in self.waits if not any(part in wait for part in allowed)]
        assert found == [], "the host waits for the device:\n  " + "\n  ".join(found)

    def note(self, kind: str) -> None:
        """Remember that the host waited."""
        hidden = (__file__, "<", f"{TORCH}/_", f"{TORCH}/utils/_", f"{TORCH}/overrides")
        frames = [
            frame for frame in traceback.extract_stack() if not frame.filename.startswith(hidden)
        ]
        ours = [
            frame
            for frame in frames
            if frame.filename.startswith(ROOT) and "/tests/" not in frame.filename
        ]
        places = [
            f"{frame.filename.removeprefix(ROOT)}:{frame.lineno}"
            for frame in (ours[-1:] + frames[-1:])
        ]
        self.waits.append(f"{kind} at {' in '.join(dict.fromkeys(places))}")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = kwargs or {}
        if (
            torch.is_inference_mode_enabled()
        ):  # where autograd has not taken apart what is made of other operations
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if (
            not _any_on_gpu((*args, *kwargs.values()))
            and torch.device(kwargs.get("device") or "cpu").type != "cuda"
        ):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in SEARCHES:
            if not (func is aten.repeat_interleave.Tensor and kwargs.get("output_size")):
                self.note(func.name())
            return SEARCHES[func](*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.note(f"{args[0].dtype} read")
            return (
                False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
            )
        if func in (aten._to_copy.default, aten.copy_.default):
            return self._copy(func, args, kwargs)
        if func in (
            aten.index.Tensor,
            aten.index_put_.default,
            aten.index_put.default,
            aten._unsafe_index_put.default,
        ):
            args = (args[0], self._found(args[1]), *args[2:])
        if func in SOLVERS:
            self.note(func.name())
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: tuple, kwargs: dict) -> Any:
        new = func is aten._to_copy.default
        source = args[0] if new else args[1]
        target = torch.device(kwargs.get("device") or source.device) if new else args[0].device
        if _on_gpu(source) and target.type == "cpu":
            self.note(f"copy {tuple(source.shape)} to the host")
            with unset_fake_temporarily():
                zeros = torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
                return zeros if new else args[0].copy_(zeros)
        if not _on_gpu(source) and target.type == "cuda" and source.numel():
            non_blocking = kwargs.get("non_blocking") or (not new and len(args) > 2 and args[2])
            same = (
                (kwargs.get("dtype") or source.dtype) == source.dtype
                if new
                else args[0].dtype == source.dtype
            )
            if not (non_blocking and source.is_pinned() and same):
                why = (
                    "from pageable memory"
                    if not source.is_pinned()
                    else "blocking"
                    if same
                    else "converted on the host"
                )
                self.note(f"copy {tuple(source.shape)} {source.dtype} to the device, {why},")
        result = func(*args, **kwargs)
        if source.dtype == torch.bool and not _on_gpu(source):
            with unset_fake_temporarily():
                result.number_found = int(source.sum())
        return result

    def _found(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Indices, of which masks have become the place that a search finds."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8) and _on_gpu(index):
                self.note(f"indexed by a mask {tuple(index.shape)}")
                number = getattr(index, "number_found", 1)
                found += [index.new_empty(number, dtype=torch.int64) for _ in range(index.ndim)]
            else:
                found.append(index)
        return found


def _on_gpu(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def _any_on_gpu(values: Sequence[Any]) -> bool:
    return any(
        _any_on_gpu(value) if isinstance(value, list | tuple) else _on_gpu(value)
        for value in values
    )


class Generators(TorchFunctionMode):
    """Refuses random numbers of one device from a generator of another, which the driver would."""

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            generator = super().__new__(cls)
            generator.place = torch.device(device)
            return generator

        device = property(lambda self: self.place)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None:
            first = args[0] if args and isinstance(args[0], Tensor) else None
            device = torch.device(
                kwargs.get("device") or (first.device if first is not None else "cpu")
            )
            assert generator.device.type == device.type, (
                f"{func}: generator on {generator.device}, numbers on {device}"
            )
        return func(*args, **kwargs)


# ---- what needs a driver


@torch.no_grad()
def run_backward(
    roots: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor] = ()
) -> list[Tensor | None]:
    """Gradients of `inputs` (then nothing is accumulated), or into `.grad` of all leaves."""
    wanted = {_edge(tensor): place for place, tensor in enumerate(inputs)}
    results: list[Tensor | None] = [None] * len(wanted)
    arrived: dict[Any, dict[int, Tensor]] = {}
    order = itertools.count()
    waiting: list[tuple[int, int, Any]] = []

    def send(node: Any, place: int, gradient: Tensor | None) -> None:
        if node is None or gradient is None:
            return
        meta = node._input_metadata[place]
        assert gradient.device.type == meta.device.type, (
            f"{node}: a gradient on {gradient.device}, its tensor on {meta.device}"
        )
        gradient = gradient.to(meta.dtype)
        if gradient.shape != tuple(meta.shape):  # of a tensor that was broadcast
            gradient = gradient.sum_to_size(tuple(meta.shape))
        if (node, place) in wanted:
            results[wanted[node, place]] = gradient
        if node not in arrived:
            arrived[node] = {}
            # A node that was made later comes earlier; AccumulateGrad has the largest number and waits for nothing else.
            heapq.heappush(
                waiting, (-node._sequence_nr() if node.next_functions else 1, next(order), node)
            )
        before = arrived[node].get(place)
        arrived[node][place] = gradient if before is None else before + gradient

    for root, gradient in zip(roots, gradients, strict=True):
        send(*_edge(root), torch.ones_like(root) if gradient is None else gradient)
    while waiting:
        _, _, node = heapq.heappop(waiting)
        known = arrived.pop(node)
        if wanted and not node.next_functions:
            continue
        values = []
        for place, meta in enumerate(node._input_metadata):
            value = known.get(place)
            if value is None and not callable(node):  # a function of ours gets zeros
                value = torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device)
            values.append(value)
        outputs = node(*values) if callable(node) else node.apply(*values)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for (following, place), gradient in zip(node.next_functions, outputs, strict=False):
            send(following, place, gradient)
    return results


def _edge(tensor: Tensor) -> tuple[Any, int]:
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _backward(tensors: Any, grad_tensors: Any = None, *args: Any, **options: Any) -> None:
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    gradients = (
        [grad_tensors]
        if isinstance(grad_tensors, Tensor)
        else list(grad_tensors or [None] * len(roots))
    )
    # By this number a checkpointed block knows what it has computed again already.
    with mock.patch.object(torch._C, "_current_graph_task_id", return_value=next(_GRAPH_TASKS)):
        run_backward(roots, gradients)


def _grad(
    outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **options: Any
) -> tuple[Tensor | None, ...]:
    roots, leaves = ([x] if isinstance(x, Tensor) else list(x) for x in (outputs, inputs))
    gradients = (
        [grad_outputs]
        if isinstance(grad_outputs, Tensor)
        else list(grad_outputs or [None] * len(roots))
    )
    return tuple(run_backward(roots, gradients, leaves))


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
        if parameter is not None:
            if id(parameter) not in moved:
                with torch.no_grad():
                    changed = function(parameter)
                same = changed is parameter
                new = (
                    parameter
                    if same
                    else nn.Parameter(changed.detach(), requires_grad=parameter.requires_grad)
                )
                moved[id(parameter)] = (
                    parameter,
                    new,
                )  # the old one stays alive, so that its id stays its own
            module._parameters[name] = moved[id(parameter)][1]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


_GRAPH_TASKS = itertools.count()


class _Properties:
    name, major, minor, total_memory, multi_processor_count = "fake GPU", 9, 0, 80 * GIB, 132


def _driver(gpu: FakeGPU, count: int) -> dict[str, Any]:
    """Answers of `torch.cuda`."""
    state = torch.zeros(16, dtype=torch.uint8)
    return {
        "is_available": lambda: count > 0,
        "is_initialized": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: gpu.note("synchronize"),
        "is_bf16_supported": lambda *args, **options: True,
        "get_device_name": lambda device=None: _Properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: _Properties,
        "get_rng_state": lambda device=None: state,
        "get_rng_state_all": lambda: [state] * count,
        "set_rng_state": lambda state, device=None: None,
        "set_rng_state_all": lambda states: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (70 * GIB, 80 * GIB),
        "empty_cache": lambda: None,
        "_lazy_init": lambda: None,
    }


def _pinned(tensor: Tensor, device: Any = None) -> Tensor:
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    tensor.is_pinned = lambda device=None: True  # type: ignore[method-assign]
    return tensor


_data_ptr = torch.UntypedStorage.data_ptr


def _storage_address(storage: torch.UntypedStorage) -> int:
    return _data_ptr(storage) if storage.device.type == "cpu" else storage._cdata


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size()


@contextlib.contextmanager
def fake_gpu(count: int = 1) -> Iterator[FakeGPU]:
    """A machine with `count` GPUs."""
    torch._C._ensureCUDADeviceGuardSet()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    gpu = FakeGPU(fake)

    def check(error: type[Exception], condition: Tensor, message: Any = None) -> None:
        if _on_gpu(condition):
            gpu.note("a check")
        elif not condition.all():
            raise error(message() if callable(message) else message)

    with contextlib.ExitStack() as stack:
        put: Callable[..., Any] = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        driver = _driver(gpu, count)
        stack.enter_context(mock.patch.multiple(torch.cuda, **driver))
        random = {
            name: answer for name, answer in driver.items() if "rng_state" in name or "seed" in name
        }
        stack.enter_context(mock.patch.multiple(torch.cuda.random, **random))
        put(FakeTensorMode, "avoid_device_init", True)
        put(torch.accelerator, "is_available", lambda: count > 0)
        put(torch.accelerator, "device_count", lambda: count)
        put(torch.accelerator, "current_device_index", lambda: 0)
        put(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        put(torch.autograd, "backward", _backward)
        put(torch.autograd, "grad", _grad)
        put(nn.Module, "_apply", _move)
        put(Tensor, "pin_memory", _pinned)
        put(FakeTensor, "data_ptr", _address)
        put(
            FakeTensor,
            "__reduce_ex__",
            lambda tensor, protocol: tensor.detach().cpu().__reduce_ex__(protocol),
        )
        put(torch.UntypedStorage, "data_ptr", _storage_address)
        put(torch, "Generator", Generators.Generator)
        put(torch, "_check_tensor_all_with", check)
        # transformers spares tensors that are traced the questions it asks others.
        put(transformers.utils.import_utils, "is_fake_tensor", lambda tensor: False)
        _forget_device()
        stack.callback(_forget_device)
        stack.enter_context(fake)
        stack.enter_context(Generators())
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


class NoWaiting(TrainerCallback):
    """Checks that in a `Trainer`, from the end of its first step to that of its last, the host never waits for the device.

    Args:
        allowed: parts of notes that are well known.
    """

    def __init__(self, gpu: FakeGPU, *allowed: str) -> None:
        self.gpu, self.allowed, self.steps = gpu, allowed, 0

    def follow(self, kind: type[Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
        """Become a callback of every trainer of this kind."""
        start = kind.__init__

        def begin(
            trainer: Trainer, *args: Any, callbacks: list[TrainerCallback], **rest: Any
        ) -> None:
            start(trainer, *args, callbacks=[*callbacks, self], **rest)

        monkeypatch.setattr(kind, "__init__", begin)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.begun:
            self.gpu.check(self.allowed)
        self.begun, self.steps = True, self.steps + 1
        self.gpu.waits.clear()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gpu.waits.clear()
