"""README.md is true: its Python runs, its commands parse, what it names is there."""

import argparse
import importlib
import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import resnet_fast
from bench.__main__ import COMMANDS as BENCH
from resnet_fast.cli import COMMANDS as CLI

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [  # (language, line, text)
    (found[1], README.count("\n", 0, found.start()) + 1, found[2])
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]
PYTHON = {f"line-{line}": text for language, line, text in BLOCKS if language == "python"}
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
MAP = next(text for _, _, text in BLOCKS if text.startswith("resnet_fast/"))
SHELL = "".join(text for language, _, text in BLOCKS if not language and text != MAP)
LINES = [line for line in map(str.strip, SHELL.splitlines()) if line]


def mapped():
    """Path → what README says of it, from the indented map of the code."""
    paths, folders = {}, []
    for line in MAP.splitlines():
        indent, name, what = re.fullmatch(r"( *)(\S+)(?: {2,}(\S.*))?", line).groups()
        folders = [*folders[: len(indent) // 2], name]
        paths["".join(folders)] = what
    return paths


@pytest.mark.parametrize("text", PYTHON.values(), ids=PYTHON)
def test_python_runs(text):
    if "torchvision" in text:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError) as error:  # RuntimeError: one made for another torch
            pytest.skip(f"torchvision does not import: {error}")
    exec(compile(text, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("line", LINES)
def test_commands_are_there(line):
    """Options too, as far as they are ours: each line goes through the command's own parser."""
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        words = ["resnet-fast", *words[words.index("resnet_fast") + 1 :]]
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert next(word for word in words[1:] if "=" not in word) in targets
    elif words[0] == "resnet-fast" or words[:3] == ["python", "-m", "bench"]:
        name, *rest = words[1:] if words[0] == "resnet-fast" else words[3:]
        parser = argparse.ArgumentParser()
        commands = CLI if words[0] == "resnet-fast" else BENCH
        importlib.import_module(commands[name][0]).add_arguments(parser)
        parser.parse_args(rest)
    else:
        assert words[0] in ("pip", "pytest"), line
        assert all((ROOT / word).exists() for word in words if word.endswith(".py"))


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", PROSE)
    local = [link for link in links if not re.match(r"\w+:", link)]
    assert "docs/fused-block.svg" in local
    assert [link for link in local if not (ROOT / link).is_file()] == []


def test_files_named_in_prose_exist():
    names = re.findall(r"`([\w./-]+/[\w./-]+|[\w-]+\.(?:py|md|toml|cpp|h))`", PROSE)
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_public_names_exist():
    names = re.findall(r"\bresnet_fast\.(\w+)", PROSE)
    assert names
    assert [name for name in names if not hasattr(resnet_fast, name)] == []


def test_environment_variables_are_read():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("*/*.py")]
    sources += ROOT.glob("resnet_fast/*/*.py")
    read = "".join(path.read_text() for path in sources if path.parent.name != "tests")
    names = set(re.findall(r"RESNET_FAST_\w+", README))
    assert names
    assert [name for name in names if f'"{name}"' not in read] == []


def test_the_map_is_the_tree():
    paths = mapped()
    assert [path for path in paths if not list(ROOT.glob(path))] == []
    package = ROOT / "resnet_fast"
    modules = list(package.glob("*.py"))
    packages = [path.parent for path in package.glob("*/__init__.py")]
    names = [f"resnet_fast/{path.name}" for path in modules]
    names += [f"resnet_fast/{path.name}/" for path in packages]
    assert [name for name in names if name not in paths] == []


def test_the_picture_stands_alone():
    root = ElementTree.parse(ROOT / "docs" / "fused-block.svg").getroot()
    assert root.get("viewBox")
    outside = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
    assert outside == []
