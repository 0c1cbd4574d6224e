"""`python -m bench table`: the tables of README and docs/benchmarks.md, and bar charts, from rows.

A page holds its table between `<!-- bench:begin -->` and `<!-- bench:end -->`; the name of a model
after `begin` limits the table to that model.

Each line of the table is one case and has only rows of one run, because only providers timed in
turns are compared. It shows the newest run of a case, whether faster or slower than the previous.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import rows
from bench.layers import flops_of

BEGIN, END = "<!-- bench:begin", "<!-- bench:end -->"
BLOCK = re.compile(rf"{BEGIN}(?: ([\w.-]+))? -->\n(?:(?!{BEGIN}).)*?{END}", re.DOTALL)
PAGES = (rows.ROOT / "README.md", rows.ROOT / "docs" / "benchmarks.md")
LABELS = {
    "eager_nchw": "eager NCHW",
    "eager": "eager",
    "compile": "torch.compile",
    "compile_default": "torch.compile default",
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "resnet_fast": "resnet_fast",
}
PEERS = ("eager", "compile", "compile_default", "openvino", "onnxruntime")
MACHINE = ("device", "cpu_or_gpu", "isa", "torch", "triton", "cuda")
CASE = ("model", "image_size", "mode", "dtype", "batch", "impl", "optimizer", "graph", "threads")

Run = dict[str, rows.Row]
"""The rows of one case in one run, by provider."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench table`."""
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.jsonl",
                        help="rows to read (default: bench/results/*.jsonl)")  # fmt: skip
    parser.add_argument("--update", nargs="*", type=Path, metavar="PAGE.md",
                        help="write the tables of these pages (default: README.md and "
                             "docs/benchmarks.md)")  # fmt: skip
    parser.add_argument("--check", action="store_true",
                        help="write nothing; exit status 1 when a page's table differs from the "
                             "rows")  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a bar chart too")


def run(args: argparse.Namespace) -> int:
    """Print, write or check tables; 1 when one differs, or rows or markers are at fault."""
    files = args.files or sorted(rows.RESULTS.glob("*.jsonl"))
    try:
        found = rows.read(files)
        if args.plot is not None:
            plot_throughput(found, args.plot)
        if not args.check and args.update is None:
            print(markdown(found))
            return 0
        pages = args.update or PAGES
        before = [page.read_text(encoding="utf-8") for page in pages]
        after = [splice(text, found, page.name) for text, page in zip(before, pages, strict=True)]
    except (OSError, ValueError, RuntimeError) as error:
        print(f"table: {error}", file=sys.stderr)
        return 1
    changed = [(page, new) for page, old, new in zip(pages, before, after, strict=True)
               if old != new]  # fmt: skip
    for page, text in changed:
        if args.check:
            print(f"table: {page} differs from the rows; run `python -m bench table --update`",
                  file=sys.stderr)  # fmt: skip
        else:
            page.write_text(text, encoding="utf-8")
    return int(args.check and bool(changed))


def splice(text: str, found: Sequence[rows.Row], name: str) -> str:
    """`text` with the table of `found` between its markers. ValueError unless there is one pair."""
    blocks = list(BLOCK.finditer(text))
    if len(blocks) != 1 or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{name}: expected one {BEGIN} --> followed by one {END}")
    (block,) = blocks
    model = block[1]
    table = markdown(one for one in found if model is None or one.get("model") in (None, model))
    begin = block[0].partition("\n")[0]
    return f"{text[: block.start()]}{begin}\n{table}\n{END}{text[block.end() :]}"


def newest(found: Iterable[rows.Row]) -> list[Run]:
    """The newest run of every case on every machine, in the order in which cases first appear."""
    runs: dict[tuple[Any, ...], Run] = {}
    for one in found:
        if one["benchmark"] != "models":
            continue
        key = tuple(one.get(name) for name in (*MACHINE, *CASE))
        run = runs.setdefault(key, {})
        dates = [other["date"] for other in run.values()]
        if dates and one["date"] > max(dates):
            run.clear()
        if not run or one["date"] == next(iter(run.values()))["date"]:
            run[one["provider"]] = one
    return list(runs.values())


def markdown(found: Iterable[rows.Row]) -> str:
    """One table per machine and versions: images/s of each provider, speedups, peak memory."""
    found = list(found)
    machines: dict[tuple[Any, ...], list[Run]] = {}
    for run in newest(found):
        one = next(iter(run.values()))
        machines.setdefault(tuple(one[name] for name in MACHINE), []).append(run)
    if not machines:
        return "No measurements yet: `python -m bench models --out bench/results/NAME.jsonl`."
    limits = {
        tuple(one[name] for name in (*MACHINE, "threads", "dtype")): 1e12 * one["tflop_per_s"]
        for one in sorted(found, key=lambda one: one["date"])
        if one["benchmark"] == "ceilings" and one["device"] == "cpu"
    }
    return "\n\n".join(_machine(runs, limits) for runs in machines.values())


def _machine(runs: Sequence[Run], limits: Mapping[tuple[Any, ...], float]) -> str:
    every = [one for run in runs for one in run.values()]
    providers = _providers(runs)
    peers = [name for name in PEERS if name in providers]
    ours = "resnet_fast" in providers
    header = ["model", "mode", "dtype", "batch", *(LABELS.get(p, p) for p in providers)]
    header += [f"vs {LABELS[p]}" for p in peers if ours] + ["peak MiB"] * bool(ours and peers)
    counts = sorted({one["threads"] for one in every})
    threads = len(counts) > 1
    header += ["threads"] * threads
    shares = [_share(run, limits) for run in runs]
    limited = any(share is not None for share in shares)
    header += ["of the FMA limit"] * limited
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3)]
    for run, share in zip(runs, shares, strict=True):
        one = next(iter(run.values()))
        line = [_model(one), _mode(one), one["dtype"], str(one["batch"])]
        line += [_figure(run[p]["images_per_s"]) if p in run else "–" for p in providers]
        if ours:
            line += [_versus(run, peer) for peer in peers]
        if ours and peers:
            line.append(_peak(run))
        line += [str(one["threads"])] * threads
        line += ["–" if share is None else f"{share:.0%}"] * limited
        lines.append(line)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = _footnote(every, bool(ours and peers), limited)
    return f"{_heading(every[0], counts)}\n\n{table}\n\n{note}"


def _share(run: Run, limits: Mapping[tuple[Any, ...], float]) -> float | None:
    """Operations per second of resnet_fast's convolutions over those of the machine's products."""
    one = run.get("resnet_fast", {})
    limit = limits.get(tuple(one.get(name) for name in (*MACHINE, "threads", "dtype")))
    if limit is None:
        return None
    return one["images_per_s"] * flops_of(one["model"], one["mode"], one["image_size"]) / limit


def _providers(runs: Iterable[Run]) -> list[str]:
    seen = dict.fromkeys(name for run in runs for name in run)
    return [name for name in LABELS if name in seen] + [n for n in seen if n not in LABELS]


def _heading(one: rows.Row, threads: Sequence[int]) -> str:
    where = f"{' and '.join(map(str, threads))} threads, " if one["device"] == "cpu" else ""
    versions = [f"PyTorch {one['torch']}"]
    versions += [f"Triton {one['triton']}"] if one["triton"] else []
    versions += [f"CUDA {one['cuda']}"] if one["cuda"] else []
    return f"**{one['cpu_or_gpu']}** ({where}{one['isa']}), {', '.join(versions)}"


def _footnote(every: Sequence[rows.Row], peak: bool, limited: bool) -> str:
    counts = sorted(one["rounds"] for one in every)
    rounds = f"{counts[0]} to {counts[-1]}" if counts[0] != counts[-1] else f"{counts[0]}"
    widest = max((one["ms_p80"] - one["ms_p20"]) / one["ms_p50"] for one in every)
    days = sorted({one["date"][:10] for one in every})
    dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    commits = ", ".join(f"`{sha}`" for sha in dict.fromkeys(one["git_sha"] for one in every) if sha)
    note = (
        f"Images/s, medians of {rounds} interleaved rounds; the 20th to 80th percentiles span at "
        f"most {100 * widest:.0f}% of the median. eager and torch.compile run channels_last. "
    )
    if peak:
        note += "Peak: live tensor memory in a step, eager → resnet_fast. "
    if limited:
        note += (
            "Of the FMA limit: the convolutions' operations per second, counted as direct "
            "convolutions, over those of FMA instructions on registers. "
        )
    return f"{note}Measured {dates}" + (f" at {commits}." if commits else ".")


def _model(one: rows.Row) -> str:
    impl = one.get("impl", "auto")
    name = one["model"] if impl == "auto" else f"{one['model']} ({impl})"
    return f"{name}, {one['image_size']} px"


def _mode(one: rows.Row) -> str:
    if one.get("optimizer", "none") == "sgd":
        return "train + SGD"
    return f"{one['mode']}, CUDA graph" if one.get("graph") else one["mode"]


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _versus(run: Run, peer: str) -> str:
    if peer not in run or "resnet_fast" not in run:
        return "–"
    if peer == "eager":
        return f"{run['resnet_fast']['speedup_vs_eager']:.2f}x"
    return f"{run[peer]['ms_p50'] / run['resnet_fast']['ms_p50']:.2f}x"


def _peak(run: Run) -> str:
    cells = [_mebibytes(run[p]) if p in run else "–" for p in ("eager", "resnet_fast")]
    return " → ".join(cells)


def _mebibytes(one: rows.Row) -> str:
    return "–" if one["peak_mb"] is None else f"{one['peak_mb']:.0f}"


def text(found: Iterable[rows.Row]) -> str:
    """One line per row, for the terminal."""
    header = ("model", "mode", "dtype", "batch", "provider", "images/s", "ms p20", "ms p50",
              "ms p80", "peak MiB", "vs eager")  # fmt: skip
    lines = [header]
    for one in found:
        ratio = one["speedup_vs_eager"]
        times = (f"{one[name]:.2f}" for name in ("ms_p20", "ms_p50", "ms_p80"))
        lines.append((
            one["model"], one["mode"], one["dtype"], str(one["batch"]), one["provider"],
            f"{one['images_per_s']:.1f}", *times,
            _mebibytes(one), "–" if ratio is None else f"{ratio:.2f}x",
        ))  # fmt: skip
    return columns(lines, left=5)


def columns(lines: Sequence[Sequence[str]], left: int) -> str:
    """Align `lines` of equally many cells in columns: the first `left` left, the rest right."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def plot_throughput(found: Iterable[rows.Row], path: Path | str) -> None:
    """PNG bar chart of throughput at `path`: one group per case, one colour per provider.

    A bar's height is relative to eager (without eager, to the case's slowest), its label is
    images/s, its whisker the 20th to 80th percentile. RuntimeError without matplotlib, ValueError
    without rows.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"plots need matplotlib (pip install matplotlib): {error}") from None
    runs = newest(found)
    if not runs:
        raise ValueError("rows: expected at least one row of benchmark 'models' to plot")
    providers = _providers(runs)
    width = 0.8 / len(providers)
    figure = Figure(figsize=(max(6.0, 1.4 + 1.5 * len(runs)), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, provider in enumerate(providers):
        group = [(x, run) for x, run in enumerate(runs) if provider in run]
        heights, errors, labels = [], [], []
        for _, run in group:
            one = run[provider]
            base = run["eager"]["ms_p50"] if "eager" in run else max(
                other["ms_p50"] for other in run.values()
            )  # fmt: skip
            fast, middle, slow = (base / one[k] for k in ("ms_p20", "ms_p50", "ms_p80"))
            heights.append(middle)
            errors.append((middle - slow, fast - middle))
            labels.append(_figure(one["images_per_s"]))
        places = [x + (i - (len(providers) - 1) / 2) * width for x, _ in group]
        bars = axes.bar(places, heights, width, label=LABELS.get(provider, provider),
                        yerr=list(zip(*errors, strict=True)), ecolor="0.3")  # fmt: skip
        axes.bar_label(bars, labels, fontsize=7, padding=2)
    names = [next(iter(run.values())) for run in runs]
    axes.set_xticks(
        range(len(runs)),
        [f"{_model(n)}\n{_mode(n)} {n['dtype']}\nbatch {n['batch']}" for n in names],
        fontsize=8,
    )
    axes.set_ylabel("throughput, eager = 1 (labels: images/s)")
    axes.set_title(_heading(names[0], [names[0]["threads"]]).replace("**", ""), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=len(providers), loc="upper left")
    axes.margins(y=0.2)
    figure.savefig(path, dpi=150)
