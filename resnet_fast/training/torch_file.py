"""Read what `torch.save` wrote, without running code from it and within the memory of the file.

`torch.load(weights_only=True)` refuses a file for one object of a class that it does not know, such
as the `argparse.Namespace` beside the weights of many training scripts. Such objects are read as
`Unread` here: their classes are not imported, and nothing of them is called.
"""

from __future__ import annotations

import io
import pickletools
import re
import threading
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from ..runtime.files import opened, reason
from ..runtime.optional import MissingPackage, imported

LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of storages
REFUSED = re.compile(r"(os|posix|nt|sys)\..*|builtins\.bytearray")  # the first four by PyTorch too
SIZED = re.compile(r"torch\.(\w+\.)*\w*(Tensor|Storage)")  # allocate what a caller asks for
EMPTY, MADE = "()", "made by "
MOST_PARTS = 10_000  # of a tuple of tuples; its hash as a key takes as many steps
KINDS = (
    ((b"version https://git-lfs",), "a Git LFS pointer; fetch the file itself: git lfs pull"),
    ((b"<!doctype", b"<html", b"<?xml"), "a web page; download the file itself"),
    ((b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"\x28\xb5\x2f\xfd"), "a compressed file; unpack it first"),
    ((b"\x89hdf",), "an HDF5 file, such as Keras writes; expected one of torch.save"),
    ((b"\x93numpy",), "a NumPy file; expected one of torch.save"),
    ((b"\x7felf", b"#!"), "a program; expected a file of torch.save"),
)
_reading = threading.Lock()  # the classes that torch.load knows are global


class CheckpointError(ValueError):
    """A file is missing, damaged or not a checkpoint; the message names it."""


class Unread:
    """Stands for an object whose class, named `path`, is not known to be safe."""

    path: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class UnreadDict(Unread):
    """Stands for an object of an unknown subclass of dict; its items are read."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


class UnreadList(Unread):
    """Stands for an object of an unknown class with items, such as deque; its items are read."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return []


def read_any(path: Path) -> Any:
    """The content of a file of `torch.save`, or of safetensors, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind; the message says which.
        MissingPackage: the file is of safetensors, which is not installed.
    """
    try:
        with opened(path) as file:
            start = file.read(512)
            file.seek(0)
            _check_kind(start)
            if path.suffix == ".safetensors":
                load_file = imported("safetensors.torch", f"{path}", "safetensors").load_file
                return load_file(path)
            names = _check_zip(file) if start[:4] == b"PK\x03\x04" else _check_legacy(file)
            file.seek(0)
            return _load(file, names)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except _OtherKind as error:
        raise CheckpointError(f"{path}: {error}") from None
    except MissingPackage:
        raise
    except Exception as error:  # a damaged file may raise any exception
        raise CheckpointError(f"{path}: damaged, or not a checkpoint: {_why(error)}") from None


class _OtherKind(ValueError):
    """The file is not of torch.save; the message says what it is, and what to do."""


def _check_kind(start: bytes) -> None:
    if not start:
        raise ValueError("empty")
    text = start.lstrip().lower()
    for marks, what in KINDS:
        if text.startswith(marks):
            raise _OtherKind(what)
    if start[257:262] == b"ustar":
        raise _OtherKind("a tar archive; unpack it first")


def _check_zip(file: IO[bytes]) -> dict[str, type[Unread]]:
    """Check an archive of torch.save: sizes, checksums (all 0 if it has none), its pickle."""
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        names = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "constants.pkl" in names or "code/" in {name[:5] for name in names}:
            raise _OtherKind(
                "a TorchScript program, which resnet_fast does not run; load it with "
                "torch.jit.load and save its state_dict()"
            )
        if "data.pkl" not in names:
            raise _OtherKind("a zip archive that torch.save did not write")
        if sum(info.file_size for info in archive.infolist()) > size:
            raise ValueError("its members are larger than the file")  # torch.save never compresses
        pickled = names["data.pkl"]
        if any(info.CRC for info in archive.infolist()):
            torn = archive.testzip()  # torch.load does not check the checksums
            if torn is not None:
                raise ValueError(f"wrong checksum of {torn}")
        else:
            del pickled.CRC  # zipfile checks none then
        return _check_pickle(io.BytesIO(archive.read(pickled)))


def _check_legacy(file: IO[bytes]) -> dict[str, type[Unread]]:
    """Check a file in the format before PyTorch 1.6: pickles, then storages."""
    pickles, found = _Clipped(file), {}
    for _ in range(LEGACY_PICKLES):
        found.update(_check_pickle(pickles))
    return found


class _Clipped:
    """A file whose `read` allocates no more than the file has."""

    def __init__(self, file: IO[bytes]) -> None:
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self.file, self.readline, self.tell = file, file.readline, file.tell

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, self.size - self.tell()))


def _check_pickle(file: Any) -> dict[str, type[Unread]]:
    """The classes and functions that a pickle names, and what stands for each, without unpickling.

    Its stack is followed with the number of parts in place of a tuple (EMPTY if it has none), a
    name in place of a class or function, MADE and the name in place of what a call returns, and 1
    in place of anything else.

    Raises:
        ValueError: it names a class of REFUSED, calls one of SIZED, or has a tuple of more than
            MOST_PARTS.
    """
    found: dict[str, type[Unread]] = {}
    stack: list[str | int] = []
    marks: list[int] = []
    memo: dict[int, str | int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        before = opcode.stack_before
        marked = pickletools.markobject in before
        below = before.index(pickletools.markobject) if marked else len(before)
        first = (marks.pop() if marked else len(stack)) - below
        if first < 0:
            raise ValueError("its stack is empty")
        taken, stack[first:] = stack[first:], []
        pushed: list[str | int] = [1] * len(opcode.stack_after)
        match opcode.name:
            case "MARK":
                marks.append(len(stack))
                pushed = []
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                module, name = NAME_MAPPING.get((module, name), (module, name))  # Python 2's
                pushed = [f"{IMPORT_MAPPING.get(module, module)}.{name}"]
                found.setdefault(pushed[0], Unread)
                if REFUSED.fullmatch(pushed[0]):
                    raise ValueError(f"it contains {pushed[0]}, which resnet_fast does not read")
            case "STACK_GLOBAL":
                raise _OtherKind(
                    "written with pickle protocol 4 or newer, which torch.load refuses for files "
                    "of unknown origin; save it again with the default protocol"
                )
            case "REDUCE" | "NEWOBJ":
                called, arguments = taken
                if isinstance(called, str):
                    pushed = [MADE + called]
                    if SIZED.fullmatch(called) and arguments != EMPTY:
                        raise ValueError(f"it calls {called}, which resnet_fast does not call")
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS" | "BUILD":
                pushed = taken[:1]
                made = str(pushed[0]).removeprefix(MADE)
                if opcode.name != "BUILD" and made in found:
                    found[made] = UnreadList if "APPEND" in opcode.name else UnreadDict
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                parts = 1 + sum(1 if isinstance(part, str) else part for part in taken)
                if parts > max(MOST_PARTS, 1 + len(taken)):
                    raise ValueError(f"it has a tuple of {parts} parts")
                pushed = [parts if taken else EMPTY]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = taken[0]
                pushed = taken
            case "GET" | "BINGET" | "LONG_BINGET":
                pushed = [memo[argument]]
            case "DUP":
                pushed = taken * 2
        stack += pushed
    return found


def _load(file: IO[bytes], names: Mapping[str, type[Unread]]) -> Any:
    # torch.load prefers its own classes, so a name that it knows is not replaced.
    known = {
        one[1] if isinstance(one, tuple) else f"{one.__module__}.{one.__qualname__}"
        for one in torch.serialization.get_safe_globals()
    }
    unread = [
        (type(name, (stands,), {"path": name}), name)
        for name, stands in names.items() if name not in known
    ]  # fmt: skip
    with _reading, torch.serialization.safe_globals(unread):
        return torch.load(file, map_location="cpu", weights_only=True)


def _why(error: Exception) -> str:
    """The reason in one line; torch.load gives it after general advice."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return found[1] if found else reason(error)
