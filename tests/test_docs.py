"""The pages under docs/ are true: their Python runs, their pictures and links are there."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

import resnet_fast
from bench.__main__ import COMMANDS as BENCH
from resnet_fast.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.name: path for path in sorted((ROOT / "docs").glob("*.md"))}
MOST_BYTES = 1_500_000
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`]+`")


@pytest.fixture(params=PAGES.values(), ids=PAGES)
def page(request):
    return request.param


def test_python_runs(page):
    """The snippets of a page go on from one another; each keeps its line in a traceback."""
    text, names = page.read_text(encoding="utf-8"), {"__name__": "docs"}
    blocks = [found for found in FENCE.finditer(text) if found[1] == "python"]
    assert blocks
    for found in blocks:
        lines = "\n" * (text.count("\n", 0, found.start()) + 1)
        exec(compile(lines + found[2], str(page), "exec"), names)


def test_commands_are_there(page):
    for _, text in FENCE.findall(page.read_text(encoding="utf-8")):
        for line in text.splitlines():
            words = shlex.split(line, comments=True) if line.startswith("resnet-fast ") else []
            if words:
                parser = argparse.ArgumentParser()
                importlib.import_module(COMMANDS[words[1]][0]).add_arguments(parser)
                parser.parse_args(words[2:])


def test_commands_in_prose_are_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for path in (*ROOT.glob("*.md"), *PAGES.values()):
        text = path.read_text(encoding="utf-8")
        for command, known in (
            ("make", targets), ("python -m bench", BENCH), ("resnet-fast", COMMANDS),
        ):  # fmt: skip
            named = re.findall(rf"`{command} (\w[\w-]*)", text)
            assert [name for name in named if name not in known] == [], path.name


def test_links_and_pictures_are_there(page):
    prose = CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    links = re.findall(r"\]\(([^)#]+)", prose)
    local = [link for link in links if not re.match(r"\w+:", link)]
    assert [link for link in local if not (page.parent / link).is_file()] == []


def test_what_prose_names_is_there(page):
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    files = re.findall(r"`([\w./-]+/[\w./-]+\.\w+|[\w-]+\.(?:toml|cpp))`", prose)
    assert [name for name in files if not (ROOT / name).exists()] == []
    names = re.findall(r"`resnet_fast\.(\w+)\(?", prose)
    assert [name for name in names if not hasattr(resnet_fast, name)] == []


def test_pictures_are_small_and_used():
    pictures = list((ROOT / "docs").glob("**/*.png"))
    assert sum(path.stat().st_size for path in pictures) < MOST_BYTES
    pages = [ROOT / "README.md", *PAGES.values()]
    told = "".join(path.read_text(encoding="utf-8") for path in pages)
    assert [path.name for path in pictures if path.name not in told] == []
