"""CUDA graphs: a model's inference, or a whole training step, recorded once and replayed.

A replay is one launch for the host, however many kernels it runs; at small batches a GPU waits for
these launches. A graph runs the recorded kernels on the recorded memory. Inputs are copied into
buffers of the graph; the next replay overwrites results and gradients. Values in memory are read
and updated at every replay: parameters, running statistics, `num_batches_tracked`, momentum, a
learning rate that is a tensor. Python values are fixed when recorded: shapes, a learning rate that
is a number, the mode of a module.
On a CPU nothing is recorded, and the same calls run one by one.

Source: Nguyen, Carilli et al., "Accelerating PyTorch with CUDA Graphs", PyTorch blog, 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .spec.values import check_tensor, given, integer

WARMUP = 3


class Graph:
    """A recorded call: `graph(*inputs)` copies the inputs, replays and returns the results.

    Attributes:
        inputs: The buffers that a replay reads. You can also write to them directly.
    """

    def __init__(
        self, run: Callable[..., Any], inputs: tuple[Tensor, ...], names: tuple[str, ...]
    ) -> None:
        self.inputs, self._names = inputs, names
        self._run = run  # keeps the model alive, whose memory a replay reads
        self._replay = _record(lambda: run(*inputs), inputs[0].device)

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the results for `inputs`, each of the example's shape and dtype, on any device.

        On a GPU the next call overwrites them: `clone` results that you keep.

        Raises:
            ValueError: another shape, dtype or number of tensors; the message names the argument.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"expected {', '.join(self._names)}, got {len(inputs)} tensors")
        for name, to, value in zip(self._names, self.inputs, inputs, strict=True):
            check_tensor(value, name)
            if value.shape != to.shape or value.dtype != to.dtype:
                raise ValueError(
                    f"{name}: expected {_described(to)} as recorded, got {_described(value)}; "
                    "record another graph for another shape"
                )
        for to, value in zip(self.inputs, inputs, strict=True):
            if value is not to:
                to.copy_(value, non_blocking=True)
        return self._replay()


class Step(Graph):
    """A recorded training step: `step(x, target)` updates the model and returns the loss.

    Attributes:
        in_graph: Whether the graph contains the optimizer's update (see `graph_step`).
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        in_graph: bool,
    ) -> None:
        super().__init__(run, inputs, ("x", "target"))
        self.in_graph, self._optimizer = in_graph, optimizer
        self._grads = [(p, p.grad) for p in model.parameters() if p.grad is not None]

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Return the loss of the batch, computed before the update; errors as in `Graph`."""
        loss = super().__call__(x, target)
        if self._optimizer is not None and not self.in_graph:
            for parameter, grad in self._grads:  # also where it was set to None
                parameter.grad = grad
            self._optimizer.step()
        return loss


def graph(model: nn.Module, example: Tensor, *, warmup: int = WARMUP) -> Graph:
    """Record inference of `model` on inputs like `example` as one CUDA graph.

    Args:
        model: a model in eval mode, on the device of `example`. Weights changed in place (an
            optimizer's step, `load_state_dict`) take effect at the next call. After moving,
            casting or training the model, record a new graph.
        example: [N, ...] with the shape, dtype, memory format and device of later inputs.
        warmup: number of calls before recording, which compile and measure kernels.

    Returns:
        A callable `y = graph(x)`, y [N, ...], without gradients. On a GPU the next call overwrites
        y. Autocast is recorded if it is on.

    Raises:
        ValueError: the model is in training mode, or an argument is invalid; the message names it.

    Example:
        ```python
        run = resnet_fast.graph(model.eval(), x)
        logits = run(x)
        ```
    """
    _check(model, {"example": example}, warmup)
    if any(module.training for module in model.modules()):
        raise ValueError("model: expected eval mode (model.eval()); graph_step records training")
    (inputs,) = _buffers(example)

    @torch.no_grad()
    def run(x: Tensor) -> Any:
        return model(x)

    with _uncached_autocast(), _aside(inputs.device):
        for _ in range(warmup):
            run(inputs)
    with _uncached_autocast():
        return Graph(run, (inputs,), ("x",))


def graph_step(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer | None,
    x: Tensor,
    target: Tensor,
    *,
    autocast: torch.dtype | None = None,
    warmup: int = WARMUP,
) -> Step:
    """Record a whole training step as one CUDA graph.

    Each call runs zero_grad, `loss(model(x), target).backward()` and `optimizer.step()`. Recording
    does not change parameters, running statistics, `num_batches_tracked`, the optimizer's state or
    the random generators: the first call is the first step.

    The graph contains the optimizer's update if its learning rates are tensors on the model's
    device (and it has no dampening): `SGD(params, torch.tensor(0.1, device="cuda"), fused=True)`.
    Schedulers write such a rate in place. A rate that is a number would be fixed in the graph, so
    the `step` of such an optimizer runs after each replay.

    Args:
        model: a model in training mode. Gradients stay in `.grad` until the next call.
        loss: function of (logits, target) that returns a scalar, such as
            `torch.nn.functional.cross_entropy`.
        optimizer: an optimizer of the model's parameters; None leaves the update to the caller.
        x: a batch [N, ...] with the shape, dtype, memory format and device of later batches.
        target: its targets, also with the shape and dtype of later ones.
        autocast: dtype of `torch.autocast` in the forward pass, or None. Gradients are not scaled;
            use bf16 instead of fp16.
        warmup: number of steps before recording, which compile and measure kernels.

    Returns:
        A callable `value = step(x, target)` that returns the loss. On a GPU the next call
        overwrites it.

    Raises:
        ValueError: the model is in eval mode, the optimizer does not have the model's parameters,
            or tensors are on several devices; the message names the argument.
    """
    _check(model, {"x": x, "target": target}, warmup)
    if not callable(loss):
        raise ValueError(f"loss: expected a function of (logits, target), got {given(loss)}")
    if not (optimizer is None or isinstance(optimizer, torch.optim.Optimizer)):
        raise ValueError(f"optimizer: expected a torch.optim.Optimizer, got {given(optimizer)}")
    if not (autocast is None or (isinstance(autocast, torch.dtype) and autocast.itemsize == 2)):
        raise ValueError(f"autocast: expected torch.bfloat16 or float16, got {given(autocast)}")
    if not model.training:
        raise ValueError("model: expected training mode (model.train()); graph records inference")
    groups = [] if optimizer is None else optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    if optimizer is not None and not any(id(p) in held for p in model.parameters()):
        raise ValueError("optimizer: expected an optimizer of the model's parameters")
    inputs = _buffers(x, target)
    device = inputs[0].device
    in_graph = all(_in_memory(group, device) for group in groups)

    def run(x: Tensor, target: Tensor) -> Tensor:
        for holder in (model, optimizer):
            if holder is not None:
                holder.zero_grad(set_to_none=True)
        on = autocast is not None
        with torch.autocast(device.type, autocast, enabled=on, cache_enabled=False):
            value = loss(model(x), target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"loss: expected a function that returns a scalar, got {given(value)}")
        value.backward()
        if optimizer is not None and in_graph:
            optimizer.step()
        return value.detach()

    with _unchanged(model, optimizer, device), _aside(device):
        for _ in range(warmup):
            run(*inputs)
    return Step(run, inputs, model, optimizer, in_graph)


def _record(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A function that repeats `run()`: the replay of a CUDA graph, or `run` on a CPU."""
    if device.type != "cuda":
        return run
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(recorded):
        results = run()

    def replay() -> Any:
        recorded.replay()
        return results

    return replay


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """A side stream on a GPU; warm-up on the default stream would prevent recording."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def _unchanged(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device
) -> Iterator[None]:
    """Undo the changes of steps inside to model, optimizer and generators.

    New optimizer state stays, as zeros, which equals the state of a first step (except with
    `dampening`; see `_in_memory`).
    """
    states = {} if optimizer is None else optimizer.state
    tensors = [*model.parameters(), *model.buffers()]
    for state in states.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    before = [(t, t.detach().clone()) for t in tensors]
    known = {id(t) for t in tensors}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)
        for state in states.values():
            for value in state.values():
                if isinstance(value, Tensor) and id(value) not in known:
                    value.zero_()


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Disable autocast's cache: a cached cast would be missing in a replay."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _in_memory(group: dict[str, Any], device: torch.device) -> bool:
    """Whether the update of `group` reads all changing values from memory."""
    rate = group["lr"]
    first_is_others = not group.get("dampening")
    return isinstance(rate, Tensor) and rate.device == device and first_is_others


def _check(model: nn.Module, tensors: dict[str, Tensor], warmup: int) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected an nn.Module, got {given(model)}")
    for name, value in tensors.items():
        check_tensor(value, name)
    integer(warmup, "warmup", "a positive integer", 1)
    lie = {name: value.device for name, value in tensors.items()}
    lie |= {f"model's {name}": p.device for name, p in model.named_parameters()}
    first, device = next(iter(lie.items()))
    for name, other in lie.items():
        if other != device:
            raise ValueError(f"{first}: expected one device, got {device}, and {name} on {other}")


def _buffers(*examples: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone(memory_format=torch.preserve_format) for t in examples)


def _described(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
