"""Find the state dict of a ResNet in a file: under which key, and after which prefix.

Training scripts store weights as `{"state_dict": …, "epoch": …}` and the like. Wrappers such as
DistributedDataParallel, torch.compile, Lightning and MoCo put words before torchvision's names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

WRAPPERS = (
    "state_dict", "model", "net", "model_ema", "ema", "teacher", "state_dict_ema",
    "model_state_dict", "module",
)  # fmt: skip
PREFIXES = ("module", "_orig_mod", "model", "backbone", "encoder", "encoder_q", "base_encoder")
HEADS = ("fc", "head", "classifier")
FIRST = "conv1.weight"
DEPTH = 3
ITSELF = "."

Names = tuple[str, ...]
Table = Mapping[Any, Any]


@dataclass(frozen=True)
class StateDict:
    """Tensors of one network in a file.

    Attributes:
        key: where they are: names of dicts and the words before the tensors' names, with dots;
            ITSELF if they are the file's content as it is.
        body: tensors by torchvision's names, without the head.
        heads: tensors of every head, by its name in the dict, {"backbone.fc": {"weight": …}}: those
            after the prefix, and those beside it, such as a classifier after a backbone.
        unused: number of other entries in the same dict.
    """

    key: str
    body: Mapping[str, Any]
    heads: Mapping[str, Mapping[str, Any]]
    unused: int


def find(content: Table, key: str | None = None) -> list[StateDict]:
    """The state dicts in `content` under WRAPPERS and PREFIXES, in any nesting.

    key: where to look, as `StateDict.key`; its names and words may be any. A state dict at exactly
        this place is returned alone.
    """
    table, path, rest = content, (), key if key not in (None, ITSELF) else ""
    while rest:
        inner = [
            k for k, v in table.items()
            if isinstance(k, str) and isinstance(v, Mapping) and f"{rest}.".startswith(f"{k}.")
        ]  # fmt: skip
        if not inner:
            break
        name = max(inner, key=len)
        table, path, rest = table[name], (*path, name), rest[len(name) + 1 :]
    if rest:
        start = f"{rest}."
        known = [prefix for prefix in _known_prefixes(table) if prefix.startswith(start)]
        prefixes = [start] if start in _prefixes(table) else known
        found = [_state_dict(table, path, prefix) for prefix in prefixes]
    else:
        found = [
            _state_dict(inner, where, prefix)
            for where, inner in _tables(table, path, WRAPPERS)
            for prefix in _known_prefixes(inner)
        ]
    return [one for one in found if one.key == key] or found


def places(content: Table) -> list[str]:
    """Every key, whatever its names, at which `find` would find a state dict; shortest first."""
    found = [
        _key(path, prefix)
        for path, table in _tables(content, (), None)
        for prefix in _prefixes(table)
    ]
    return sorted(found, key=lambda key: (key.count("."), key))


def _tables(content: Table, path: Names, names: Names | None) -> Iterator[tuple[Names, Table]]:
    """`content` and the dicts in it under `names`, or under any, each once."""
    seen: set[int] = set()
    level = [(path, content)]
    for _ in range(DEPTH + 1):
        inner = []
        for where, table in level:
            if id(table) not in seen:
                seen.add(id(table))
                yield where, table
                for name in table if names is None else names:
                    value = table.get(name)
                    if isinstance(name, str) and isinstance(value, Mapping):
                        inner.append(((*where, name), value))
        level = inner


def _prefixes(table: Table) -> list[str]:
    """The words, each with its dot, before FIRST in the names of a dict."""
    names = (k for k in table if isinstance(k, str) and f".{k}".endswith(f".{FIRST}"))
    return sorted(name[: -len(FIRST)] for name in names)


def _known_prefixes(table: Table) -> list[str]:
    return [p for p in _prefixes(table) if all(word in PREFIXES for word in p.split(".")[:-1])]


def _key(path: Names, prefix: str) -> str:
    return ".".join((*path, *prefix.split(".")[:-1])) or ITSELF


def _state_dict(table: Table, path: Names, prefix: str) -> StateDict:
    names = {k: v for k, v in table.items() if isinstance(k, str)}
    own = {k.removeprefix(prefix): v for k, v in names.items() if k.startswith(prefix)}
    if not prefix:  # beside the tensors there may be an epoch, an optimizer and so on
        own = {k: v for k, v in own.items() if isinstance(v, Tensor)}
    body = {k: v for k, v in own.items() if k.partition(".")[0] not in HEADS}
    heads: dict[str, dict[str, Any]] = {}
    words = prefix.split(".")[:-1]
    for outer in [".".join([*words[:i], ""]) if i else "" for i in range(len(words), -1, -1)]:
        for name, value in names.items():
            head, _, rest = name.removeprefix(outer).partition(".")
            if name.startswith(outer) and head in HEADS and rest:
                heads.setdefault(f"{outer}{head}", {})[rest] = value
    used = len(body) + sum(map(len, heads.values()))
    return StateDict(_key(path, prefix), body, heads, len(table) - used)
