"""Gradients without autograd's engine, which needs a driver for each device of the graph.

`backward` and `grad` take the place of torch's. They walk the graph node by node, without the hooks
of tensors and gradients.
"""

import heapq
import itertools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_GRAPH_TASKS = itertools.count()


@torch.no_grad()
def run_backward(
    roots: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor] = ()
) -> list[Tensor | None]:
    """Gradients of `inputs` (then nothing is accumulated), or into `.grad` of all leaves."""
    wanted = {_edge(tensor): place for place, tensor in enumerate(inputs)}
    needed = _leading_to([node for node, _ in wanted], roots)
    results: list[Tensor | None] = [None] * len(wanted)
    arrived: dict[Any, dict[int, Tensor]] = {}
    order = itertools.count()
    waiting: list[tuple[int, int, Any]] = []

    def send(node: Any, place: int, gradient: Tensor | None) -> None:
        if node is None or gradient is None or (wanted and node not in needed):
            return
        meta = node._input_metadata[place]
        assert gradient.device.type == meta.device.type, (
            f"{node}: a gradient on {gradient.device}, its tensor on {meta.device}"
        )
        gradient = gradient.to(meta.dtype)
        if gradient.shape != tuple(meta.shape):  # of a tensor that was broadcast
            gradient = gradient.sum_to_size(tuple(meta.shape))
        if (node, place) in wanted:
            earlier = results[wanted[node, place]]
            results[wanted[node, place]] = gradient if earlier is None else earlier + gradient
        if node not in arrived:
            arrived[node] = {}
            # Nodes that were made later come first; AccumulateGrad has the largest number of all.
            number = -node._sequence_nr() if node.next_functions else 1
            heapq.heappush(waiting, (number, next(order), node))
        before = arrived[node].get(place)
        arrived[node][place] = gradient if before is None else before + gradient

    for root, gradient in zip(roots, gradients, strict=True):
        send(*_edge(root), torch.ones_like(root) if gradient is None else gradient)
    while waiting:
        _, _, node = heapq.heappop(waiting)
        known = arrived.pop(node)
        if wanted and not any(following in needed for following, _ in node.next_functions):
            continue
        values = _inputs_of(node, known)
        del known
        outputs = node(*values) if callable(node) else node.apply(*values)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for (following, place), gradient in zip(node.next_functions, outputs, strict=False):
            send(following, place, gradient)
    return results


def _inputs_of(node: Any, known: dict[int, Tensor]) -> list[Tensor | None]:
    """What a node of the graph is called with, of the gradients that arrived."""
    values = []
    for place, meta in enumerate(node._input_metadata):
        value = known.get(place)
        if value is None and not callable(node):  # a function of ours gets zeros
            value = torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device)
        values.append(value)
    return values


def _leading_to(wanted: Sequence[Any], roots: Sequence[Tensor]) -> set[Any]:
    """The nodes between the roots and the wanted ones, both included."""
    before: dict[Any, list[Any]] = {_edge(root)[0]: [] for root in roots}
    waiting = list(before) if wanted else []
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is not None and following not in before:
                before[following] = []
                waiting.append(following)
            if following is not None:
                before[following].append(node)
    needed, waiting = set(wanted), list(wanted)
    while waiting:
        for node in before.get(waiting.pop(), ()):
            if node not in needed:
                needed.add(node)
                waiting.append(node)
    return needed


def _edge(tensor: Tensor) -> tuple[Any, int]:
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor) else list(value)


def _graph_task() -> Any:
    """By its number a checkpointed block knows what it has computed again already."""
    number = next(_GRAPH_TASKS)
    return mock.patch.object(torch._C, "_current_graph_task_id", return_value=number)


def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **options: Any) -> None:
    roots = _listed(tensors)
    with _graph_task():
        run_backward(roots, _listed(grad_tensors or [None] * len(roots)))


def grad(
    outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **options: Any
) -> tuple[Tensor | None, ...]:
    roots = _listed(outputs)
    gradients = _listed([None] * len(roots) if grad_outputs is None else grad_outputs)
    with _graph_task():
        return tuple(run_backward(roots, gradients, _listed(inputs)))
