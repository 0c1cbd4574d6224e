"""The demo's HTML page and its pictures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import digits, rows, table
from resnet_fast.experiments import html_page
from resnet_fast.experiments.html_page import neutral
from resnet_fast.verify import Check
from resnet_fast.verify import report as checks_report

COLORS = dict(zip(("plain", "fused", "plain NCHW"), html_page.COLORS, strict=False))
LABELS = {
    "plain": "plain PyTorch",
    "fused": "resnet_fast",
    "plain NCHW": "plain PyTorch, NCHW",
}
WINDOW = 15
PARTS = {"ops": "Ops", "blocks": "Blocks", "models": "Whole models"}


def write(
    out: Path,
    *,
    environment: str,
    checks: Sequence[Check],
    curves: Mapping[str, digits.Curve],
    measured: Sequence[rows.Row],
    claims: Sequence[tuple[str, bool]],
    facts: Mapping[str, Any],
) -> Path:
    """Write OUT/report.html and its pictures; returns its path. RuntimeError without matplotlib."""
    pictures = {"training.png": lambda path: plot_training(curves, path)}
    if measured:
        pictures["throughput.png"] = lambda path: neutral(table.plot_throughput, measured, path)
    for name, draw in pictures.items():
        draw(out / name)
    path = out / "report.html"
    text = _page(environment, checks, curves, measured, claims, facts, out)
    path.write_text(text, encoding="utf-8")
    return path


def plot_training(curves: Mapping[str, digits.Curve], path: Path) -> None:
    """PNG at `path`: loss per step, test accuracy per epoch, distance from the plain net's loss."""
    neutral(_plot_training, curves, path)


def _plot_training(curves: Mapping[str, digits.Curve], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, drift = figure.subplots(1, 3)
    for name, curve in curves.items():
        style = {"color": COLORS[name], "label": LABELS[name]}
        line = {"linewidth": 3.5, "alpha": 0.6} if name == "plain" else {"linewidth": 1.2}
        values = _smooth(curve.losses)
        loss.plot(range(1, len(values) + 1), values, **style, **line)
        reached = [100 * value for value in curve.accuracies]
        accuracy.plot(range(1, len(reached) + 1), reached, marker="o", ms=4, **style, **line)
        if name != "plain":
            values = [max(value, 1e-8) for value in digits.drift(curves, name)]
            drift.plot(range(1, len(values) + 1), values, linewidth=1, **style)
    loss.set(title=f"training loss, mean of {WINDOW} steps", xlabel="step", yscale="log")
    accuracy.set(title="test accuracy", xlabel="epoch", ylim=(0, 103))
    accuracy.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    accuracy.xaxis.set_major_locator(MaxNLocator(integer=True))
    drift.set(title="distance from plain PyTorch's loss", xlabel="step", yscale="log")
    for axes in (loss, accuracy, drift):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(frameon=False, fontsize=8, loc="best")
        axes.title.set_fontsize(10)
    figure.savefig(path, dpi=160)


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean of the last WINDOW values, of fewer at the start."""
    spans = (values[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(values)))
    return [sum(span) / len(span) for span in spans]


def _page(environment, checks, curves, measured, claims, facts, out) -> str:
    ok = all(held for _, held in claims)
    machine = f"{facts['cpu_or_gpu']}, {facts['threads']} threads, PyTorch {facts['torch']}"
    sections = [
        _tiles(checks, curves, measured),
        f'<section><h2>Claims</h2>{html_page.claims(claims)}</section>',
        _training(curves, out / "training.png"),
    ]
    if measured:
        sections.append(_throughput(measured, out / "throughput.png"))
    sections.append(_verification(checks))
    sections.append(
        "<section><h2>Environment</h2><details><summary>resnet-fast env</summary>"
        f"<pre>{html.escape(environment)}</pre></details></section>"
    )
    commit = f", commit <code>{html.escape(facts['git_sha'])}</code>" if facts["git_sha"] else ""
    body = f"""<header>
<h1>resnet_fast <span class="badge {"good" if ok else "bad"}">{"ok" if ok else "failed"}</span></h1>
<p>Fused residual networks for PyTorch, checked and measured on this machine:
{html.escape(machine)}. <span class="quiet">{html.escape(facts["date"])}{commit}</span></p>
</header>
<main>
{"".join(sections)}
</main>
<footer>Made by <code>python -m bench demo</code>. The rows are in <code>throughput.jsonl</code>,
the checks in <code>verify.json</code>, beside this page.</footer>"""
    return html_page.document("resnet_fast: demo", body)


def _tiles(checks, curves, measured) -> str:
    right = sum(check.ok for check in checks)
    tiles = [(f"{right:,}", f"of {len(checks):,} checks passed")]
    plain, fused = (curves[name].accuracies[-1] for name in ("plain", "fused"))
    tiles.append((f"{fused:.1%}", f"test accuracy on digits; plain PyTorch {plain:.1%}"))
    for mode, word in (("infer", "inference"), ("train", "training")):
        best = [
            one for one in measured
            if one["provider"] == "resnet_fast" and one["mode"] == mode and one["speedup_vs_eager"]
        ]  # fmt: skip
        if best:
            one = max(best, key=lambda row: (row["model"] == "resnet50", row["batch"]))
            what = f"{word}, {one['model']}, batch {one['batch']}, over eager channels_last"
            tiles.append((f"{one['speedup_vs_eager']:.2f}\u00d7", what))
    cells = (f"<div><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>" for a, b in tiles)
    return f'<section class="tiles">{"".join(cells)}</section>'


def _training(curves: Mapping[str, digits.Curve], image: Path) -> str:
    lines = [("", "loss, last epoch", "test accuracy", "ms per step")]
    for name, curve in curves.items():
        last = curve.losses[-(len(curve.losses) // max(len(curve.accuracies), 1)) :]
        lines.append((
            LABELS[name], f"{sum(last) / len(last):.4f}", f"{curve.accuracies[-1]:.2%}",
            f"{1e3 * curve.seconds / len(curve.losses):.1f}",
        ))  # fmt: skip
    return f"""<section><h2>Training</h2>
<p>ResNet-20 on 1,797 scans of handwritten digits, from the same weights and the same batches, with
resnet_fast and with plain PyTorch. The losses are equal up to rounding at first. Training amplifies
any difference, so later they diverge, as do two runs of plain PyTorch that differ only in memory
format (right).</p>
{html_page.picture(image, "Training loss, test accuracy, and the distance between the losses")}
{html_page.table(lines)}</section>"""


def _throughput(measured: Sequence[rows.Row], image: Path) -> str:
    lines = [("model", "mode", "batch", "provider", "images/s", "ms", "peak MiB", "vs eager")]
    for one in measured:
        ratio = one["speedup_vs_eager"]
        lines.append((
            one["model"], one["mode"], str(one["batch"]),
            table.LABELS.get(one["provider"], one["provider"]), f"{one['images_per_s']:.1f}",
            f"{one['ms_p50']:.1f}", f"{one['peak_mb']:.0f}",
            "\u2013" if ratio is None else f"{ratio:.2f}\u00d7",
        ))  # fmt: skip
    return f"""<section><h2>Throughput</h2>
<p>Medians of interleaved rounds, fp32, 224 pixels; eager is PyTorch in channels_last. This is a
short run: <code>python -m bench models</code> measures longer and includes
<code>torch.compile</code>.</p>
{html_page.picture(image, "Throughput of resnet_fast and eager PyTorch")}
<details><summary>All figures</summary>{html_page.table(lines, left=4)}</details></section>"""


def _verification(checks: Sequence[Check]) -> str:
    parts = []
    for part, title in PARTS.items():
        found = [check for check in checks if check.part == part]
        if not found:
            continue
        failed = sum(not check.ok for check in found)
        state = f"{failed} failed" if failed else "all passed"
        lines = "".join(_verdict(row) for row in checks_report.rows(found))
        parts.append(
            f"<details{' open' if failed else ''}><summary>{title}: {len(found):,} checks, {state}"
            '</summary><div class="scroll"><table class="verify"><thead><tr><th>what<th>dtype'
            "<th>layout<th>checks<th>worst<th>error<th>allowed<th>of it<th></tr></thead>"
            f"<tbody>{lines}</tbody></table></div></details>"
        )
    return f"""<section><h2>Verification</h2>
<p>Every result is compared with plain PyTorch in fp64. The allowed error is twice (for gradients
three times) that of plain PyTorch in the same dtype, plus rounding. One line summarizes all checks
of its kind and shows the worst.</p>
{"".join(parts)}</section>"""


def _verdict(row: checks_report.Row) -> str:
    worst, setting = row.worst, row.setting
    share = min(worst.severity, 1.0) if row.ok else 1.0
    verdict = worst.verdict
    cells = [
        html.escape(row.what), setting.dtype, setting.layout, str(len(row.checks)),
        html.escape(f"{worst.tensor} [{worst.case}]"), checks_report.figure(verdict.error),
        checks_report.figure(verdict.allowed), f'<meter value="{share:.2f}"></meter>',
        "ok" if row.ok else f"<b>FAIL</b> {html.escape(verdict.why)}",
    ]  # fmt: skip
    return f'<tr class="{"good" if row.ok else "bad"}"><td>{"<td>".join(cells)}</tr>'
