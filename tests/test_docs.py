"""README and the pages are true: their Python runs, their commands parse, what they name exists."""

import argparse
import importlib
import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from torchvision_ops import why_not

import resnet_fast
from bench.__main__ import COMMANDS as BENCH
from resnet_fast.cli import COMMANDS as CLI
from resnet_fast.runtime import settings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PATHS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "examples/README.md"]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
MAP = re.search(r"^```\n(resnet_fast/\n.*?)^```$", PAGES["docs/architecture.md"], re.M | re.S)[1]
COMMANDS = [
    pytest.param(line, id=f"{name}: {line[:60]}")
    for name, text in PAGES.items()
    for language, block in FENCE.findall(text)
    if not language and block != MAP
    for line in map(str.strip, block.splitlines())
    if re.match(r"(\w+=\S+ )*(resnet-fast|python|torchrun|make|pip|pytest) ", line)
]
MOST_WORDS = 900
MOST_BYTES = 1_500_000


def prose(text):
    return FENCE.sub("", text)


@pytest.fixture(params=PAGES)
def page(request):
    return request.param


def snippets():
    """(page, Python blocks with the line of each): README's stand alone, a page's go on."""
    for name, text in PAGES.items():
        found = [
            (text.count("\n", 0, block.start()) + 1, block[2])
            for block in FENCE.finditer(text)
            if block[1] == "python"
        ]
        for part in [[one] for one in found] if name == "README.md" else [found] if found else []:
            yield pytest.param(name, part, id=f"{name}:{part[0][0]}")


@pytest.mark.parametrize("name, blocks", snippets())
def test_python_runs(name, blocks, capsys):
    """Each block keeps its line in a traceback; what it prints is what the page shows."""
    missing = any("torchvision\n" in text for _, text in blocks) and why_not("torchvision")
    if missing:
        pytest.skip(missing)
    names = {"__name__": "docs"}
    for line, text in blocks:
        exec(compile("\n" * line + text, name, "exec"), names)
    said = capsys.readouterr().out
    for language, shown in FENCE.findall(PAGES[name]) if "print(" in blocks[0][1] else ():
        lines = [one for one in shown.splitlines() if language == "text" and one != "…"]
        assert [one for one in lines if one.rstrip() not in said] == []


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_there(line):
    """Their options too: each line goes through the command's own parser."""
    words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
    words = words[: words.index("&&")] if "&&" in words else words
    if words[0] == "torchrun" and "resnet_fast" in words:
        words = ["resnet-fast", *words[words.index("resnet_fast") + 1 :]]
    if words[0] == "make":
        assert words[1] in TARGETS
    elif words[0] == "resnet-fast" or words[1:3] == ["-m", "bench"]:
        name, *rest = words[1:] if words[0] == "resnet-fast" else words[3:]
        parser = argparse.ArgumentParser()
        commands = CLI if words[0] == "resnet-fast" else BENCH
        importlib.import_module(commands[name][0]).add_arguments(parser)
        parser.parse_args(rest)
    else:
        scripts = [word for word in words if word.endswith(".py") and word != "my_script.py"]
        assert [word for word in scripts if not (ROOT / word).exists()] == []


def test_commands_in_prose_are_there(page):
    text = prose(PAGES[page])
    for command, known in (("make", TARGETS), ("python -m bench", BENCH), ("resnet-fast", CLI)):
        named = re.findall(rf"`{command} ([a-z][\w-]*)", text)
        assert [name for name in named if name not in known] == []


def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)", re.sub(r"`[^`]+`", "", prose(PAGES[page])))
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if re.match(r"\w+:", link):
            continue
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def anchors(path):
    """Names that headings of a page get: of words and hyphens, as Markdown makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles)
    return [re.sub(r"[\s-]+", "-", title) for title in plain]


def test_what_prose_names_is_there(page):
    text = prose(PAGES[page])
    files = re.findall(r"`([\w./-]+/[\w-]+\.\w+|[\w-]+\.(?:toml|cpp))`", text)
    roots = (ROOT, ROOT / "resnet_fast")
    made = ("build/", "runs/", "OUT/")
    missing = [f for f in files if not any((r / f).exists() for r in roots)]
    assert [name for name in missing if not name.startswith(made)] == []
    names = re.findall(r"\bresnet_fast\.([a-zA-Z]\w*)", text)
    assert [name for name in names if not hasattr(resnet_fast, name)
            and not importlib.util.find_spec(f"resnet_fast.{name}")] == []  # fmt: skip


def test_environment_variables_are_read(page):
    known = [*(setting.variable for setting in settings.ALL), "RESNET_FAST_BUILD"]
    names = re.findall(r"RESNET_FAST_[A-Z_]+", PAGES[page])
    assert [name for name in names if name not in known] == []


def test_every_setting_has_a_line():
    """`settings.md` gives each variable with the values that it may have."""
    for one in settings.ALL:
        row = f"| `{one.variable}` | {one.expected} |"
        assert row in PAGES["docs/settings.md"], row


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: ([\w.]+)$", PAGES["docs/api.md"], re.MULTILINE)
    training = importlib.import_module("resnet_fast.training")
    public = [f"resnet_fast.{name}" for name in resnet_fast.__all__]
    public += [f"resnet_fast.training.{name}" for name in training.__all__]
    assert set(public) <= set(listed)


def test_readme_is_short():
    """Every word counts, code too, but those of the generated table."""
    text = re.sub(r"<!-- bench:begin.*?bench:end -->", "", README, flags=re.DOTALL)
    assert len(text.split()) <= MOST_WORDS


def test_readme_gives_the_range_of_the_tables():
    """The speedups that its first screen names are the extremes of all rows."""
    tables = re.split(r"^\*\*", PAGES["docs/benchmarks.md"], flags=re.MULTILINE)
    found = {}
    for table in tables:
        header = next((line for line in table.splitlines() if line.startswith("| model")), None)
        if header is None:
            continue
        where = "CPU" if "threads" in table.partition("\n")[0] else "GPU"
        cells = [c.strip() for c in header.split("|")]
        for line in table.splitlines():
            for title, cell in zip(cells, line.split("|"), strict=False):
                if title.startswith("vs ") and cell.strip().endswith("x"):
                    peer = "torch.compile" if "compile" in title else title.removeprefix("vs ")
                    found.setdefault((where, peer), []).append(float(cell.strip()[:-1]))
    for (where, peer), values in found.items():
        words = f"{min(values):.2f}x to {max(values):.2f}x {peer}"
        line = next(line for line in README.splitlines() if line.startswith(f"- {where}"))
        assert words in line, (where, words)


def test_the_map_is_the_tree():
    paths, folders = {}, []
    for line in MAP.splitlines():
        indent, name, what = re.fullmatch(r"( *)(\S+)(?: {2,}(\S.*))?", line).groups()
        folders = [*folders[: len(indent) // 2], name]
        paths["".join(folders)] = what
    assert [path for path in paths if not list(ROOT.glob(path))] == []
    package = ROOT / "resnet_fast"
    names = [f"resnet_fast/{path.name}" for path in package.glob("*.py")]
    names += [f"resnet_fast/{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert [name for name in names if name not in paths] == []


def test_pictures_stand_alone_and_are_used():
    pictures = [*ROOT.glob("docs/**/*.png"), *ROOT.glob("docs/*.svg")]
    assert sum(path.stat().st_size for path in pictures) < MOST_BYTES
    told = "".join(PAGES.values())
    assert [path.name for path in pictures if path.name not in told] == []
    for path in ROOT.glob("docs/*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.get("viewBox")
        assert [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")] == []


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", text, re.MULTILINE)[1] == resnet_fast.__version__
    assert re.search(r"^license: (.*)$", text, re.MULTILINE)[1] == "MIT"
