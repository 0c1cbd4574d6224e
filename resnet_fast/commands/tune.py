"""`resnet-fast tune`: measure what the tuning tables lack for a model, and print the speedup.

For every model, batch, dtype and mode one step finds the shapes that are in no table. Their
implementations (`dispatch.auto_impl`) and tiles (`kernels.config_select`) are measured and written
to the user's tables, which later processes of this user read. The step is timed before and after.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..dispatch import auto_impl, backends, replay
from ..runtime import settings, tuning_tables
from ..runtime.options import integers, names
from ..spec.dtypes import PRECISIONS

MODES = ("infer", "train")


@dataclass(frozen=True)
class Gain:
    """Milliseconds per step before and after, and the number of entries measured."""

    before: float
    after: float
    entries: int

    def __str__(self) -> str:
        ratio = self.before / self.after
        return (
            f"{self.entries} entries measured; {self.before:.2f} ms per step before, "
            f"{self.after:.2f} ms after ({ratio:.2f}x)"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast tune`; every item of a list is checked."""
    from ..models import list_models

    add = parser.add_argument
    add("--model", type=names(list_models), required=True, metavar="NAME,…",
        help="models, of resnet_fast.list_models()")  # fmt: skip
    add("--batch", type=integers, required=True, metavar="N,…", help="batch sizes in images")
    add("--dtype", type=names(PRECISIONS), default=["bf16"], metavar="DTYPE,…",
        help="of bf16, fp16, fp32 (default: bf16); in training that of autocast")  # fmt: skip
    add("--mode", type=names(MODES), default=list(MODES), metavar="MODE,…",
        help="of infer, train (default: both)")  # fmt: skip
    add("--image-size", type=integers, default=[224], metavar="PX,…",
        help="input heights and widths in pixels (default: 224)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Tune every combination of the options; returns 0, or 2 without a GPU."""
    if not torch.cuda.is_available():
        print(
            "resnet-fast tune: error: torch.cuda.is_available() is False here; tuning needs a GPU "
            "(on a CPU there is nothing to choose)",
            file=sys.stderr,
        )
        return 2
    gpu = torch.cuda.get_device_name()
    for model in args.model:
        for mode in args.mode:
            for dtype in args.dtype:
                for size in args.image_size:
                    for batch in args.batch:
                        step = step_of(model, mode, PRECISIONS[dtype], batch, size)
                        title = f"{model} {mode} {dtype} batch {batch} at {size}"
                        print(f"{title}: {tune(step, milliseconds, title)}", flush=True)
    for kind in ("impls", "tiles"):
        print(f"{kind}: {tuning_tables.user_table(kind, gpu)}")
    return 0


def tune(step: Callable[[], object], time: Callable[[Callable[[], object]], float], title: str = "",
         ) -> Gain:  # fmt: skip
    """Measure the entries that `step` needs and the tables lack; time(step) before and after.

    Runs with `torch.backends.cudnn.benchmark`: cuDNN searches for its fastest algorithms.
    """
    with _cudnn_benchmark():
        before = time(step)
        missing = _missing(step)
        bar = tqdm(total=len(missing), desc=title, unit="shape", disable=None)
        with settings.AUTOTUNE.set_to("1"), bar:
            found: set[tuple[str, ...]] = set()

            def measured(*entry: str) -> None:
                if entry not in found:
                    found.add(entry)
                    bar.total = max(bar.total, len(found))  # each candidate has its own tiles
                    bar.update()

            _forget()
            with tuning_tables.watching(measured):
                step()
        _forget()
        return Gain(before, time(step), len(found))


def _missing(step: Callable[[], object]) -> set[tuple[str, ...]]:
    missing: set[tuple[str, ...]] = set()
    _forget()
    with tuning_tables.watching(lambda *entry: missing.add(entry)):
        step()
    return missing


def _forget() -> None:
    replay.forget()
    auto_impl.forget()
    kernels, _ = backends.triton_module()
    if kernels is not None:
        kernels.config_select.forget()


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def step_of(
    model: str, mode: str, dtype: torch.dtype, batch: int, size: int, device: str = "cuda"
) -> Callable[[], object]:
    """One step on random images: inference, or forward and backward without an optimizer."""
    from ..models import create_model

    net = create_model(model).to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    if mode == "infer":
        net, x = net.eval().to(dtype), x.to(dtype)

        def infer() -> torch.Tensor:
            with torch.inference_mode():
                return net(x)

        return infer
    target = torch.zeros(batch, dtype=torch.long, device=device)
    narrow = dtype != torch.float32

    def train() -> torch.Tensor:
        net.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype if narrow else torch.bfloat16, enabled=narrow):
            loss = F.cross_entropy(net(x), target)
        loss.backward()
        return loss

    return train


def milliseconds(step: Callable[[], object]) -> float:
    """Median time of a step in milliseconds."""
    from torch.utils.benchmark import Timer

    return 1e3 * Timer("step()", globals={"step": step}).blocked_autorange(min_run_time=1.0).median
