"""The python version of CIFAR-10: pickled batches in a folder or in its .tar.gz.

https://www.cs.toronto.edu/~kriz/cifar.html: five training batches and a test batch, each a dict of
`data` (bytes [N, 3072], the red plane first) and `labels`, and `batches.meta` with the names.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = "cifar-10-batches-py"
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST, META = "test_batch", "batches.meta"
BROKEN = (tarfile.TarError, EOFError, zlib.error, pickle.UnpicklingError, OSError)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and plain values; raises UnpicklingError for anything else."""

    def find_class(self, module: str, name: str):
        reconstruct = np.zeros(0).__reduce__()[0]  # its module differs between numpy 1 and 2
        known = {"_reconstruct": reconstruct, "ndarray": np.ndarray, "dtype": np.dtype}
        if module.split(".")[0] == "numpy" and name in known:
            return known[name]
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"contains {module}.{name}; expected arrays and plain values")


def read_cifar10(path: Path) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor, Tensor]:
    """Read (class names, train_x, train_y, test_x, test_y) from the archive or folder `path`.

    x [N,3,32,32] in uint8, y [N] in int64. Raises ValueError naming a missing or damaged file.
    """
    files = _files(path)
    names = files[META].get(b"label_names")
    if not names:
        raise ValueError(f"{path}: {META} has no label_names")
    classes = tuple(name.decode() for name in names)
    train = [_images(path, name, files[name], len(classes)) for name in TRAIN]
    train_x, train_y = (torch.cat(parts) for parts in zip(*train, strict=True))
    return classes, train_x, train_y, *_images(path, TEST, files[TEST], len(classes))


def _files(path: Path) -> dict[str, dict]:
    """The unpickled batches by name."""
    wanted = (*TRAIN, TEST, META)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_dir():
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        for name in wanted:
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name}: no such file; CIFAR-10 needs it")
        return {name: _load(folder / name, (folder / name).read_bytes()) for name in wanted}
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if name in wanted and member.isfile():
                    content = archive.extractfile(member).read()
                    found[name] = _load(f"{path}: {member.name}", content)
    except BROKEN as error:
        raise ValueError(f"{path}: damaged, or not a tar archive: {error}") from None
    for name in wanted:
        if name not in found:
            raise ValueError(f"{path}: has no {name}; expected the python version of CIFAR-10")
    return found


def _load(where: Path | str, content: bytes) -> dict:
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise any exception
        raise ValueError(f"{where}: not a CIFAR-10 batch: {error}") from None
    if not isinstance(batch, dict):
        raise ValueError(f"{where}: not a CIFAR-10 batch: expected a dict, got {type(batch)}")
    return batch


def _images(path: Path, name: str, batch: dict, classes: int) -> tuple[Tensor, Tensor]:
    data, labels = batch.get(b"data"), batch.get(b"labels")
    right = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3072,)
    if not right or labels is None or len(labels) != len(data):
        raise ValueError(f"{path}: {name}: expected 3072 bytes and one label per image")
    y = torch.tensor(labels)
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"{path}: {name}: expected labels from 0 to {classes - 1}")
    return torch.from_numpy(data.copy()).view(-1, 3, 32, 32), y
