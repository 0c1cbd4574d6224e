"""`python -m bench decoding`: images per second of the input pipeline, alone and in training.

JPEGs of mixed sizes are made in a temporary folder, smooth noise at several scales as in a photo.
"read" is decoding and augmentation, "train" a training step on what was read; "memory" is that
step on images in memory. Worker processes are started before the clock.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import resnet_fast
from bench import rows, step, timing
from resnet_fast.runtime.optional import MissingPackage, imported
from resnet_fast.runtime.options import positive, whole
from resnet_fast.training.imagefolder import ImageFolder
from resnet_fast.training.transforms import Transform

CPU = torch.device("cpu")
SIDES = (200, 1600)  # pixels
QUALITIES = (75, 95)
GRIDS = (4, 16, 64, 256)  # noise of each size, resized to the image
WEIGHTS = (0.5, 0.3, 0.2)  # of every grid after the first
CLASSES = 2
TRANSFORMS = {
    "crop-flip": Transform("resized-crop-flip"),
    "all": Transform("resized-crop-flip", 9, 0.25),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench decoding`."""
    add = parser.add_argument
    add("--images", type=positive(int), default=2000, metavar="N",
        help="JPEGs to make (default: 2000)")  # fmt: skip
    add("--workers", type=whole(0), nargs="+", default=[0, 1, 2], metavar="N",
        help="numbers of worker processes (default: 0 1 2)")  # fmt: skip
    add("--batch", type=positive(int), default=32, metavar="N", help="batch size (default: 32)")
    add("--image-size", type=positive(int), default=224, metavar="N",
        help="pixels of an input (default: 224)")  # fmt: skip
    add("--model", default="resnet18", metavar="NAME", help="default: resnet18")
    add("--batches", type=positive(int), default=32, metavar="N",
        help="batches that a round reads (default: 32)")  # fmt: skip
    add("--steps", type=positive(int), default=8, metavar="N",
        help="training steps of a round (default: 8)")  # fmt: skip
    add("--rounds", type=positive(int), default=3, metavar="N", help="default: 3")
    add("--seed", type=int, default=0, help="of the images and their augmentation (default: 0)")
    add("--out", type=Path, metavar="FILE.jsonl", help="append the rows to this file")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 without Pillow or torchvision."""
    try:
        with tempfile.TemporaryDirectory(prefix="resnet_fast-decoding-") as folder:
            make_images(Path(folder), args.images, args.seed)
            data = ImageFolder(Path(folder), args.image_size)
            found = measured(args, data)
    except MissingPackage as error:
        print(f"decoding: {error}", file=sys.stderr)
        return 1
    print(text(found))
    if args.out is not None:
        rows.append(args.out, found)
    return 0


def make_images(folder: Path, count: int, seed: int) -> None:
    """Write `count` JPEGs, one folder per class; the same for the same seed."""
    for label in range(CLASSES):
        (folder / str(label)).mkdir()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(_make_image, repeat(folder), repeat(seed), range(count)))


def _make_image(folder: Path, seed: int, index: int) -> None:
    Image = imported("PIL.Image", "images", "pillow")
    random = np.random.default_rng((seed, index))
    size = tuple(int(side) for side in random.integers(*SIDES, 2, endpoint=True))

    def noise(grid: int):
        levels = random.integers(0, 256, (grid, grid, 3), dtype=np.uint8)
        return Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)

    image = noise(GRIDS[0])
    for grid, weight in zip(GRIDS[1:], WEIGHTS, strict=True):
        image = Image.blend(image, noise(grid), weight)
    quality = int(random.integers(*QUALITIES, endpoint=True))
    image.save(folder / str(index % CLASSES) / f"{index}.jpg", quality=quality)


def measured(args: argparse.Namespace, data: ImageFolder) -> list[rows.Row]:
    """A row of every transform and number of workers, timed in turns."""
    # One data set per number of workers, whose processes stay.
    sets = {workers: data.seen_by(data.preprocessing) for workers in args.workers}
    case = step.Case(args.model, "train", args.batch, "fp32", CPU, args.image_size, optimizer="sgd")
    model = resnet_fast.create_model(args.model, num_classes=CLASSES)
    step.prepare(model, case, "channels_last")
    optimizer = step.optimizer_of(model, case)

    def read(name: str, workers: int, batches: int, turn: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(turn)
        order = torch.randint(data.count("all"), (batches, args.batch), generator=generator)
        return sets[workers].batches(
            "all", list(order), CPU, workers, transform=TRANSFORMS[name], seed=args.seed, epoch=turn
        )

    def reading(name: str, workers: int, turn: int) -> None:
        for _ in read(name, workers, args.batches, turn):
            pass

    def training(name: str, workers: int, turn: int) -> None:
        learn(read(name, workers, args.steps, turn))

    def learn(batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        for x, y in batches:
            x = data.preprocessing.normalize(x).contiguous(memory_format=torch.channels_last)
            step.train(model, x, y, torch.float32, optimizer)

    (ready,) = read("crop-flip", 0, 1, 0)
    runs: dict[tuple[str, str], Callable[[int], None]] = {}
    for workers in args.workers:
        for name in TRANSFORMS:
            runs["read", f"{name}, {workers} workers"] = partial(reading, name, workers)
        runs["train", f"crop-flip, {workers} workers"] = partial(training, "crop-flip", workers)
    runs["train", "memory"] = lambda turn: learn(repeat(ready, args.steps))
    counts = {key: args.batches if key[0] == "read" else args.steps for key in runs}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for workers in args.workers:  # starts the processes, fills the caches
        learn(read("crop-flip", workers, max(2, workers), 0))
    for turn in range(1, args.rounds + 1):
        for key in timing.rotated(list(runs), turn):
            start = time.perf_counter()
            runs[key](turn)
            times[key].append((time.perf_counter() - start) * 1e3 / counts[key])
    for one in sets.values():
        one.close()
    facts, found = rows.facts(CPU), []
    for (mode, provider), ms in times.items():
        p20, p50, p80 = timing.spread(ms)
        trains = mode == "train"
        found.append(rows.layer_row(
            facts, benchmark="decoding", model=args.model if trains else None, mode=mode,
            batch=args.batch, dtype="fp32" if trains else "uint8",
            layout="channels_last" if trains else None, provider=provider, rounds=args.rounds,
            image_size=args.image_size, images_per_s=args.batch / p50 * 1e3,
            ms_p20=p20, ms_p50=p50, ms_p80=p80,
        ))  # fmt: skip
    return found


def text(found: list[rows.Row]) -> str:
    """One line per row: images per second, and milliseconds per batch."""
    lines = [f"{'mode':6} {'provider':24} {'images/s':>9} {'ms/batch':>9} {'p20':>8} {'p80':>8}"]
    for row in found:
        place = f"{row['mode']:6} {row['provider']:24} {row['images_per_s']:9.1f}"
        lines.append(f"{place} {row['ms_p50']:9.1f} {row['ms_p20']:8.1f} {row['ms_p80']:8.1f}")
    return "\n".join(lines)
