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


@dataclass(frozen=True)
class StateDict:
    """Tensors of one network in a file.

    Attributes:
        key: where they are: names of dicts and the words before the tensors' names, with dots; ""
            if they are the file's content as it is.
        body: tensors by torchvision's names, without the head.
        heads: for every name of HEADS that is there, its tensors: {"fc": {"weight": …, "bias": …}}.
        others: number of entries beside them in the same dict.
    """

    key: str
    body: Mapping[str, Any]
    heads: Mapping[str, Mapping[str, Any]]
    others: int


def find(content: Mapping[Any, Any], key: str = "") -> list[StateDict]:
    """The state dicts in `content` under WRAPPERS and PREFIXES, in any nesting.

    key: names of dicts and then words before the tensors' names, with dots; both may be any. Only
        what is there is returned.
    """
    table, path, rest = content, (), key
    while rest:
        inner = [
            k for k, v in table.items()
            if isinstance(k, str) and isinstance(v, Mapping) and f"{rest}.".startswith(f"{k}.")
        ]  # fmt: skip
        if not inner:
            start = f"{rest}."
            exact = start in _starts(table)
            prefixes = [start] if exact else [p for p in _prefixes(table) if p.startswith(start)]
            return [_taken(table, path, prefix) for prefix in prefixes]
        name = max(inner, key=len)
        table, path, rest = table[name], (*path, name), rest[len(name) + 1 :]
    return [
        _taken(table, path, prefix)
        for path, table in _tables(table, path, 0)
        for prefix in _prefixes(table)
    ]


def _tables(
    content: Mapping[Any, Any], path: tuple[str, ...], depth: int
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    yield path, content
    for name in WRAPPERS if depth < DEPTH else ():
        inner = content.get(name)
        if isinstance(inner, Mapping):
            yield from _tables(inner, (*path, name), depth + 1)


def _starts(table: Mapping[Any, Any]) -> set[str]:
    """The words, each with its dot, before FIRST in the names of a dict."""
    names = (k for k in table if isinstance(k, str) and f".{k}".endswith(f".{FIRST}"))
    return {name[: -len(FIRST)] for name in names}


def _prefixes(table: Mapping[Any, Any]) -> list[str]:
    return [p for p in sorted(_starts(table)) if all(w in PREFIXES for w in p.split(".")[:-1])]


def _taken(table: Mapping[Any, Any], path: tuple[str, ...], prefix: str) -> StateDict:
    names = {k: v for k, v in table.items() if isinstance(k, str)}
    own = {k.removeprefix(prefix): v for k, v in names.items() if k.startswith(prefix)}
    if not prefix:  # beside the tensors there may be an epoch, an optimizer and so on
        own = {k: v for k, v in own.items() if isinstance(v, Tensor)}
    body = {k: v for k, v in own.items() if k.partition(".")[0] not in HEADS}
    words, heads = prefix, _heads(own)
    while not heads and words:  # a head beside the backbone
        words = words[: words[:-1].rfind(".") + 1]
        outside = {k.removeprefix(words): v for k, v in names.items() if k.startswith(words)}
        heads = _heads(outside)
    used = len(body) + sum(map(len, heads.values()))
    key = ".".join((*path, *prefix.split(".")[:-1]))
    return StateDict(key, body, heads, len(table) - used)


def _heads(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        head, _, rest = name.partition(".")
        if head in HEADS and rest:
            found.setdefault(head, {})[rest] = value
    return found
