"""The python version of CIFAR-10: pickled batches in a folder or in its .tar.gz.

https://www.cs.toronto.edu/~kriz/cifar.html: five training batches and a test batch, each a dict of
`data` (bytes [N, 3072], the red plane first) and `labels`, and `batches.meta` with the names.
A file of any origin is safe to read: it cannot run code, and it takes a bounded amount of memory.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..runtime.files import opened, reason

FOLDER = "cifar-10-batches-py"
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST, META = "test_batch", "batches.meta"
WANTED = (*TRAIN, TEST, META)
BROKEN = (tarfile.TarError, EOFError, zlib.error, OSError)
CHUNK = 1 << 20
FILE_BYTES = 64 << 20  # a batch has 31 MB
ARCHIVE_BYTES = 1 << 30  # unpacked; CIFAR-10 has 186 MB
INSTRUCTIONS = 1_000_000  # of a pickle; a batch has about 100,000
# Python 3 pickles bytes as text, with encode, in protocols 0 to 2.
FUNCTIONS = re.compile(
    r"numpy\.(_?core\.multiarray\._reconstruct|_?core\.numeric\._frombuffer|ndarray|dtype)"
    r"|_codecs\.encode"
)
NUMBER = re.compile(r"\|[bui]1|[<>]([ui][248]|f[248])")  # byte order and code of a dtype
# Objects of other modules, and sets: the hash of nested tuples can take exponential time.
REFUSED = (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.ADDITEMS, pickle.FROZENSET)
# Where the stack has the keys when an instruction fills a dict.
KEYS = dict.fromkeys((pickle.SETITEMS, pickle.DICT), slice(0, None, 2))
KEYS[pickle.SETITEM] = slice(-2, -1)


@dataclass(eq=False)
class _Call:
    """A call that a pickle asks for, and the state that it sets then. Nothing is called."""

    function: object
    arguments: object
    state: object = None


# Python's unpickler, because the one in C allocates its memo by an index that the file sets: 32 GiB
# for a LONG_BINPUT of 2**31. Python's memo is a dict. The stack never holds anything callable.
class _Unpickler(pickle._Unpickler):
    """Unpickles plain values, and a `_Call` for each NumPy array; refuses anything else."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="bytes")  # Python 2's strings are bytes
        self.instructions, self.encodable = INSTRUCTIONS, len(content)

    @property
    def dispatch(self) -> _Unpickler:
        """Where load() looks up the function of each instruction."""
        return self

    def __getitem__(self, code: int) -> Callable:
        name, load = bytes([code]), pickle._Unpickler.dispatch.get(code)
        self.instructions -= 1
        if self.instructions < 0 or load is None or name in REFUSED:
            raise pickle.UnpicklingError("expected only instructions for arrays and plain values")
        if name in KEYS and any(type(key) not in (bytes, str) for key in self.stack[KEYS[name]]):
            raise pickle.UnpicklingError("expected only strings as the keys of a dict")
        return getattr(_Unpickler, load.__name__)

    def find_class(self, module: str, name: str) -> str:
        if not FUNCTIONS.fullmatch(f"{module}.{name}"):
            found = ascii(f"{module}.{name}"[:80])[1:-1]
            raise pickle.UnpicklingError(f"contains {found}; expected arrays and plain values")
        return name

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        match function, arguments:
            case "encode", (str(text), "latin1") if len(text) <= self.encodable:
                self.encodable -= len(text)  # one text can be encoded many times
                self.append(text.encode("latin1"))
            case _:
                self.append(_Call(function, arguments))

    def load_build(self) -> None:
        state, call = self.stack.pop(), self.stack[-1]
        if type(call) is not _Call:
            raise pickle.UnpicklingError("expected the state of an array")
        call.state = state

    load_bytearray8 = pickle._Unpickler.load_binbytes8  # its own allocates before it reads


def _array(call: _Call) -> np.ndarray:
    """The array of numbers that NumPy pickles as `call`. Raises UnpicklingError for other calls."""
    match call.function, call.arguments, call.state:
        case "_reconstruct", ("ndarray", (0,), b"b"), (
            (1, tuple(shape), _Call() as dtype, bool(fortran), bytes(data))
        ):
            order = "F" if fortran else "C"
        case "_frombuffer", (bytes(data), _Call() as dtype, tuple(shape), "C" | "F" as order), None:
            pass
        case _:
            raise pickle.UnpicklingError("expected an array in the form that NumPy pickles")
    match dtype.function, dtype.arguments, dtype.state:
        case "dtype", (code, *_), (3, endian, None, None, None, -1, -1, 0):
            number = _text(endian) + _text(code)
        case _:
            number = ""
    if not NUMBER.fullmatch(number):
        raise pickle.UnpicklingError("expected an array of numbers")
    right = len(shape) <= 8 and all(type(n) is int and 0 <= n <= FILE_BYTES for n in shape)
    if not right or math.prod(shape) * np.dtype(number).itemsize != len(data):
        raise pickle.UnpicklingError("expected an array whose shape agrees with its bytes")
    return np.frombuffer(data, number).reshape(shape, order=order)


def _text(value: object) -> str:
    """A string of NumPy's, which is bytes if Python 2 wrote it; "" for any other value."""
    return value.decode("latin1") if type(value) is bytes else value if type(value) is str else ""


def read_cifar10(path: Path) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor, Tensor]:
    """Read (class names, train_x, train_y, test_x, test_y) from the archive or folder `path`.

    An archive is a tar file, gzipped or not. x [N,3,32,32] in uint8, y [N] in int64.
    Raises ValueError naming a file that is missing, damaged, too large or wrong.
    """
    files = _files(path)
    names = files[META].get(b"label_names")
    try:
        if type(names) is not list or not names:
            raise TypeError
        classes = tuple(str(n.encode() if type(n) is str else n, "utf-8") for n in names)
    except (TypeError, UnicodeError):
        wrong = f"{META} has no label_names that are a list of strings in UTF-8"
        raise ValueError(f"{path}: {wrong}") from None
    train = [_images(path, name, files[name], len(classes)) for name in TRAIN]
    train_x, train_y = (torch.cat(parts) for parts in zip(*train, strict=True))
    return classes, train_x, train_y, *_images(path, TEST, files[TEST], len(classes))


def _files(path: Path) -> dict[str, dict]:
    """The unpickled batches by name."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file or folder")
    contents = _folder(path) if os.path.isdir(path) else _archive(path)
    try:
        found = {name: _load(f"{path}: {name}", content) for name, content in contents}
    except BROKEN as error:
        raise ValueError(f"{path}: damaged, or not a tar archive: {reason(error)}") from None
    for name in WANTED:
        if name not in found:
            raise ValueError(f"{path}: has no {name}; expected the python version of CIFAR-10")
    return found


def _folder(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each batch in a folder."""
    folder = path / FOLDER if os.path.isdir(path / FOLDER) else path
    for name in WANTED:
        try:
            with opened(folder / name) as file:
                content = file.read(_allowed(path, name, os.fstat(file.fileno()).st_size))
        except OSError as error:
            raise ValueError(f"{folder / name}: {reason(error)}; CIFAR-10 needs it") from None
        yield name, content


def _archive(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each batch in a tar archive.

    Headers are parsed by `tarfile`, but the archive is walked here: `tarfile.open` does not end for
    a negative size (Python 3.11.7), holds extended headers of any size in memory, and does not read
    to the end, where gzip has its checksum.
    """
    left = ARCHIVE_BYTES

    def read(size: int) -> bytes:
        nonlocal left
        left -= size
        if left < 0:
            raise tarfile.ReadError(f"unpacks to more than {ARCHIVE_BYTES >> 20} MiB")
        return stream.read(size)

    with opened(path) as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if zipped else file
        while (header := read(512)) != bytes(512):
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            # Links, devices, folders and pipes have no content.
            size = 0 if member.type in b"123456" else member.size
            name, end = Path(member.name).name, size + -size % 512
            if member.isreg() and name in WANTED:
                content = read(_allowed(path, name, size))
                if len(content) < size:
                    raise tarfile.ReadError("unexpected end of data")
                yield name, content
                end -= size
            for start in range(0, end, CHUNK):
                read(min(CHUNK, end - start))
        while read(CHUNK):
            pass


def _allowed(path: Path, name: str, size: int) -> int:
    """`size`. Raises ValueError if it is not that of a batch."""
    if not 0 <= size <= FILE_BYTES:
        raise ValueError(f"{path}: {name}: has {size} bytes; expected at most {FILE_BYTES}")
    return size


def _load(where: str, content: bytes) -> dict:
    """The dict that a batch is, with arrays in place of calls."""
    try:
        batch = _Unpickler(content).load()
        if type(batch) is not dict:
            raise pickle.UnpicklingError(f"expected a dict, got {type(batch).__name__}")
        return {k: _array(v) if type(v) is _Call else v for k, v in batch.items()}
    except Exception as error:  # a damaged pickle may raise any exception
        raise ValueError(f"{where}: not a CIFAR-10 batch: {reason(error)[:200]}") from None


def _images(path: Path, name: str, batch: dict, classes: int) -> tuple[Tensor, Tensor]:
    """x [N,3,32,32] in uint8 and y [N] in int64 of a batch."""
    data, labels = batch.get(b"data"), batch.get(b"labels")
    right = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3072,)
    if right and isinstance(labels, np.ndarray) and labels.shape == (len(data),):
        labels = labels.tolist()
    if not right or type(labels) is not list or len(labels) != len(data):
        raise ValueError(f"{path}: {name}: expected 3072 bytes and one label per image")
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise ValueError(f"{path}: {name}: expected labels from 0 to {classes - 1} as integers")
    x = torch.from_numpy(data.copy()).view(-1, 3, 32, 32)
    return x, torch.tensor(labels, dtype=torch.int64)
