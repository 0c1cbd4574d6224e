"""The optimizers of `Recipe.optimizer`: PyTorch's SGD and AdamW, LARS, and Muon for filters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .recipe import Recipe

TRUST = 1e-3
MOMENTUM = "momentum_buffer"


class Lars(torch.optim.SGD):
    """LARS (You et al. 2017, arXiv:1708.03888): each weight's step is in proportion to its norm.

    For a weight w with gradient g and weight decay d: g ← t · (g + d·w) with
    t = trust · ‖w‖ / (‖g‖ + d·‖w‖), or 1 where a norm is 0; then SGD with momentum. It changes
    the gradients in place.

    Args:
        weights: parameters that are scaled: filters, and the head's weight.
        rest: groups of the other parameters, for plain SGD.
        lr: learning rate.
        momentum: as `torch.optim.SGD`.
        weight_decay: d.
        trust: the paper's η.
    """

    def __init__(
        self, weights: Sequence[Tensor], rest: Sequence[dict[str, Any]], lr: float,
        momentum: float, weight_decay: float, trust: float = TRUST,
    ) -> None:  # fmt: skip
        scaled = {"params": weights, "trust": trust, "decay": weight_decay}
        super().__init__([scaled, *rest], lr, momentum)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on gradients that are there; `closure` as `torch.optim.SGD`."""
        for group in self.param_groups:
            for p in group["params"] if "trust" in group else ():
                if p.grad is not None:
                    size, slope = p.norm(), p.grad.norm()
                    t = group["trust"] * size / (slope + group["decay"] * size)
                    t = torch.where((size > 0) & (slope > 0), t, 1.0)
                    p.grad.add_(p, alpha=group["decay"]).mul_(t)
        return super().step(closure)


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` for filters [K,C,R,S] as matrices [K, C·R·S]; AdamW for the rest.

    `torch.optim.Muon` (Jordan et al. 2024) takes matrices only, so it runs on views of the filters.
    Its steps have the RMS of AdamW's (Liu et al. 2025, arXiv:2502.16982): one learning rate suits
    both. The order of columns in a matrix, C·R·S or R·S·C, does not change the step.

    Args:
        filters: parameters of four dimensions, contiguous or channels_last.
        rest: groups of the other parameters.
        lr: learning rate.
        momentum: of the filters, with Nesterov's.
        weight_decay: of the filters, decoupled.

    Raises:
        ValueError: this PyTorch has no `torch.optim.Muon`.
    """

    def __init__(
        self, filters: Sequence[Tensor], rest: Sequence[dict[str, Any]], lr: float,
        momentum: float, weight_decay: float,
    ) -> None:  # fmt: skip
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"optimizer: muon needs PyTorch 2.9 or newer; this is {torch.__version__}"
            )
        self.matrices = {p: _matrix(p.detach(), p) for p in filters}
        self.inner = (
            torch.optim.Muon(
                self.matrices.values(), lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr),
        )
        groups = [{"params": filters, "weight_decay": weight_decay}, *rest]
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step on gradients that are there; a closure is not supported."""
        for p, matrix in self.matrices.items():
            matrix.grad = None if p.grad is None else _matrix(p.grad, p)
        inner = [group for optimizer in self.inner for group in optimizer.param_groups]
        for group, own in zip(inner, self.param_groups, strict=True):
            group["lr"], group["weight_decay"] = own["lr"], own["weight_decay"]
        for optimizer in self.inner:
            optimizer.step()
        for matrix in self.matrices.values():
            matrix.grad = None
        for p, optimizer, its in self._places():
            if its in optimizer.state:
                self.state[p] = optimizer.state[its]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer`."""
        super().load_state_dict(state_dict)
        for p, optimizer, its in self._places():
            if p in self.state:
                optimizer.state[its] = self.state[p]

    def _places(self) -> Iterator[tuple[Tensor, torch.optim.Optimizer, Tensor]]:
        """Each parameter, the optimizer that has its state, and its key there."""
        for group in self.param_groups:
            for p in group["params"]:
                matrix = self.matrices.get(p)
                yield p, self.inner[matrix is None], p if matrix is None else matrix


def _matrix(x: Tensor, p: Tensor) -> Tensor:
    """x [K,C,R,S] as a matrix, for the parameter p a view of it."""
    last = not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last)
    return (x.permute(0, 2, 3, 1) if last else x).flatten(1)


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer of `recipe` for the parameters of `model` that require a gradient.

    Without `decay_norms`, normalizations and biases have no weight decay.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = {"weight_decay": recipe.weight_decay}
    kept = decay if recipe.decay_norms else {"weight_decay": 0.0}
    if recipe.optimizer in ("lars", "muon"):
        lars = recipe.optimizer == "lars"
        main = [p for p in parameters if (p.ndim > 1 if lars else p.ndim == 4)]
        if not main:
            raise ValueError(f"optimizer: {recipe.optimizer} expected filters to train, got none")
        groups = [
            {"params": [p for p in parameters if 1 < p.ndim != 4], **decay},
            {"params": [p for p in parameters if p.ndim <= 1], **kept},
        ]
        make = Lars if lars else Muon
        return make(main, groups[lars:], recipe.lr, recipe.momentum, recipe.weight_decay)
    groups = [{"params": parameters, **decay}]
    if not recipe.decay_norms:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], **decay},
            {"params": [p for p in parameters if p.ndim <= 1], **kept},
        ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, recipe.lr)
    return torch.optim.SGD(groups, recipe.lr, recipe.momentum, nesterov=recipe.nesterov)


def slots_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor] | None:
    """What `optimizer` stores for p, by name: tensors of equal shape and dtype. None: unknown."""
    if isinstance(optimizer, Muon):
        if p in optimizer.matrices:
            return {MOMENTUM: optimizer.matrices[p]}
    elif isinstance(optimizer, torch.optim.SGD):
        return {MOMENTUM: p.detach()}
    elif type(optimizer) is not torch.optim.AdamW:
        return None
    return {"step": torch.tensor(0.0), "exp_avg": p.detach(), "exp_avg_sq": p.detach()}
