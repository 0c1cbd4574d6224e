"""`python -m bench decoding`: the images it makes, and its rows."""

import json
import sys

import numpy as np
import pytest
import torchvision_ops

from bench import decoding
from bench.__main__ import main as bench

Image = pytest.importorskip("PIL.Image")
SMALL = [
    "decoding", "--images", "12", "--workers", "0", "1", "--batch", "4", "--image-size", "32",
    "--batches", "2", "--steps", "1", "--rounds", "2",
]  # fmt: skip


def test_the_images_are_like_photos(tmp_path):
    """The same for a seed, of many sizes, and neither constant nor noise."""
    found = []
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        decoding.make_images(folder, 6, 3)
        found.append({p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.jpg")})
    assert found[0] == found[1] and len(found[0]) == 6
    sizes = set()
    for path in (tmp_path / "one").rglob("*.jpg"):
        with Image.open(path) as image:
            sizes.add(image.size)
            x = np.asarray(image.convert("L")).astype(float)
        assert x.std() > 10
        assert np.abs(np.diff(x)).mean() < x.std()
        assert path.stat().st_size < x.size  # less than a byte a pixel
    assert len(sizes) == 6
    assert all(200 <= side <= 1600 for size in sizes for side in size)


def test_rows_of_every_number_of_workers(tmp_path, capsys):
    if (reason := torchvision_ops.why_not("torchvision.transforms.v2")) is not None:
        pytest.skip(reason)
    out = tmp_path / "rows.jsonl"
    assert bench([*SMALL, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(row["mode"], row["provider"]) for row in rows} == {
        *(("read", f"{name}, {n} workers") for name in ("crop-flip", "all") for n in (0, 1)),
        *(("train", f"crop-flip, {n} workers") for n in (0, 1)), ("train", "memory"),
    }  # fmt: skip
    for row in rows:
        assert row["benchmark"] == "decoding" and row["batch"] == 4 and row["rounds"] == 2
        assert row["images_per_s"] == pytest.approx(4e3 / row["ms_p50"], rel=1e-3)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + len(rows) and "images/s" in said[0]


def test_without_torchvision(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    assert bench(SMALL) == 1
    assert "pip install torchvision" in capsys.readouterr().err
