"""Random damaged and hostile files: each is read, or refused in one line that names it.

    python tests/fuzz_files.py --inputs 5000 --seed 0     files of every kind
    python tests/fuzz_files.py --one 1234                 that input again; its file is kept

An input is drawn from its seed alone; its kind is KINDS[seed % 5]. It is a valid file of which
bytes, pickle instructions, members of the archive or values were changed. The reader must return,
or raise a ValueError (for a tuning table: give one warning) of one line, below 1000 characters,
that names the file. Violations are other errors, code of the file that runs, a process that dies,
more than 10 s of CPU time, and an allocation beyond the memory limit. Status 1 if there is one.
"""

from __future__ import annotations

import argparse
import faulthandler
import gzip
import io
import json
import math
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    from PIL import Image
except ImportError:
    Image = None
try:
    from safetensors import torch as safetensors
except ImportError:
    safetensors = None

sys.path.insert(0, str(Path(__file__).parent / "support"))
import training_cases

import resnet_fast
from resnet_fast.runtime import tuning_tables
from resnet_fast.training import cifar, fit
from resnet_fast.training.checkpoint import ModelSpec
from resnet_fast.training.images import read_image
from resnet_fast.training.preprocessing import Preprocessing
from resnet_fast.training.weights import load_weights

KINDS = ("checkpoint", "weights", "cifar", "image", "table")
MARKER = "executed"  # code of a file that runs writes this file
SECONDS = 10  # of CPU time an input
STUCK = 60  # seconds an input, where it waits or the machine is busy
ROOM = 3 << 30  # bytes of address space beyond those of a process that has read valid files
LONGEST = 1000  # characters of a message
CHUNK = 500  # inputs of a process
INTERPRETER = [str(Path(__file__).resolve())]
NO_MEMORY = re.compile(r"MemoryError|allocate|not enough memory|mmap")
RECIPE = replace(training_cases.RECIPE, epochs=2, ema=0.9)
SPEC = ModelSpec("resnet18", {"planes": 4, "stem": "cifar", "num_classes": 4})
WAYS = ("values", "values", "values", "pickle", "bytes", "members")
SIDES = 37, 23  # of the valid images
HUGE = (0, 1, 0x7FFF, 0xFFFF, 13_000, 100_000, 0x7FFFFFFF, 0xFFFFFFFF)


class Call:
    """Pickled as a call of `function`, and the state that the result is set to."""

    def __init__(self, function: Callable, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.reduced


def nested(depth: int, shared: bool = False) -> list:
    """A list in a list …; `shared`: twice in each, so that a walk takes 2^depth steps."""
    value: list = []
    for _ in range(depth):
        value = [value, value] if shared else [value]
    return value


STORAGE = torch.storage.TypedStorage(
    wrap_storage=torch.zeros(4).untyped_storage(), dtype=torch.float32, _internal=True
)
LOOP: list = []
LOOP.append(LOOP)
OBJECT, RECONSTRUCT = np.dtype("O"), np.empty(0).__reduce__()[0]
ANY = [None, True, -1, 0, 1, 10**9, 10**30, 0.5, math.nan, math.inf, -math.inf, "", "x" * 10**5,
       "a\nb", "\ud800\x1b[2J", [], {}, nested(100), [1, "a"], {"a": 1}]  # fmt: skip
PICKLED = [b"x", (), 1j, nested(60, shared=True), LOOP, {0, 1}, OrderedDict(a=1),
           torch.float32, torch.Size([2])]  # fmt: skip
CALLS = [
    Call(os.system, f"echo > {MARKER}"), Call(eval, f"open({MARKER!r}, 'w')"),
    Call(exec, f"open({MARKER!r}, 'w')"), Call(subprocess.Popen, ["touch", MARKER]),
    Call(open, MARKER, "w"), Call(bytearray, 10**11), Call(argparse.Namespace),
    Call(np.ndarray, (1,), OBJECT, b"A" * 8), np.array([None, {}], dtype=object),
    Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1,), OBJECT, False, b"A" * 8)),
    Call(RECONSTRUCT, np.ndarray, (10**11,), b"b"), np.zeros((2, 3)), np.float64(1),
    Call(torch.UntypedStorage, 10**12), Call(torch.FloatTensor, 10**11),
    Call(torch.Tensor, 10**6, 10**6), Call(Counter, {"a": "b"}), Call(torch.Size, [10**10]),
    Call(torch.device, "cuda:99"), Call(complex, "nan"), Call(OrderedDict, [(1, 2, 3)]),
    Call(torch._utils._rebuild_tensor_v2, STORAGE, 0, (10**6, 10**6), (0, 1), False, OrderedDict()),
    Call(torch._utils._rebuild_tensor_v2, STORAGE, 2, (10**6,), (1,), False, OrderedDict()),
    Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (10**9,), (1,), False),
]  # fmt: skip
TENSORS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: torch.tensor(1.5), lambda t: t.new_empty(0), lambda t: t.long(), lambda t: t > 0,
    lambda t: t.to(torch.complex64), lambda t: t.to(torch.complex64).conj(),
    lambda t: t.float().to_sparse(), lambda t: torch.eye(3).to_sparse_csr(),
    lambda t: t.to("meta"), lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: torch.zeros(1).expand(10**10), lambda t: torch.zeros(1, dtype=t.dtype).expand(10**10),
    lambda t: t.flatten()[:1].expand(t.shape), lambda t: torch.zeros(9).as_strided((3, 3), (1, 1)),
    lambda t: t.float().clone().requires_grad_(), lambda t: torch.nn.Parameter(t.float()),
    lambda t: torch.full_like(t.float(), math.nan), lambda t: torch.full_like(t.float(), 1e38),
    lambda t: t.new_zeros((*t.shape, 1)), lambda t: t[None], lambda t: t.flatten()[1:],
    lambda t: t.double(), lambda t: t.half(), lambda t: t.to(torch.float8_e4m3fn), lambda t: t.mT,
    lambda t: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    lambda t: t.new_zeros(2 * t.numel())[::2].view(t.shape), lambda t: t.new_zeros(0, 10**9),
    lambda t: torch._neg_view(t.float()), lambda t: torch.zeros(t.shape, dtype=t.dtype) + 255,
]  # fmt: skip
TWICE = b"".join(b"q%ch%c\x86" % (i, i) for i in range(40))  # a tuple of the last one, twice
RAW = [
    b"]" * 100_000 + b"a" * 99_999, b"\x80\x02}N" + TWICE + b"Ns",
    b"\x80\x04\x8f(N" + TWICE + b"\x90",
    b"\x80\x02Nr\xff\xff\xff\x7f", b"I" + b"9" * 100_000 + b"\n", b"L" + b"9" * 100_000 + b"L\n",
    b"\x80\x02X\xff\xff\xff\xff", b"\x8e" + b"\xff" * 7 + b"\x3f",
    b"\x96" + b"\0" * 5 + b"\x40\0\0",
    b"\x80\x04\x95" + b"\xff" * 7 + b"\x3f", b"(S'echo > executed'\nios\nsystem\n", b"\x82\x01",
    b"(cos\nsystem\nS'echo > executed'\no", b"\x80\x04\x8c\x02os\x8c\x06system\x93X\0\0\0\0\x85R",
    b"\x80\x02(}" + b"N0" * 300_000, b"\x80\x02]" + b"2" * 300_000, b"\x80\x02" + b"(" * 100_000,
    b"\x80\x02]q\0" + b"(" + b"h\0" * 1000 + b"e", b"\x80\x02\x8b\x10\x27\0\0" + b"\x7f" * 10_000,
    b"cnumpy\nndarray\n((I1\ntcnumpy\ndtype\n(S'V8'\nI0\nI1\ntR(I3\nS'|'\nN(S'f'\nt(dS'f'\n"
    b"(cnumpy\ndtype\n(S'O'\ntRI0\ntsI8\nI1\nI0\ntbC\x08AAAAAAAAtR",
]  # fmt: skip
TABLES = {
    "tiles": {"conv": {"64 56": {"config": [128, 64, 32], "us": 12.5}, "64 28": {"config": [1]}}},
    "impls": {"resnet": {"a": {"impl": "native", "us": {"native": 1.5}, "bytes": 9, "flop": 7}}},
}


class Drawn(random.Random):
    """Random numbers of a seed, and in `said` what was made of them."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.said: list[str] = []


def brief(value: Any) -> str:
    """A few words about a value, which may be of any size or refer to itself."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.layout} tensor"
    if isinstance(value, Call):
        return f"a call of {value.reduced[0].__name__}"
    short = value is None or isinstance(value, (float, str, bytes, torch.dtype))
    short = short or (isinstance(value, int) and value < 10**31)
    return repr(value)[:20] if short else f"a {type(value).__name__}"


def damaged(r: Drawn, data: bytes) -> bytes:
    """`data` with one to three ranges changed, removed or doubled."""
    for _ in range(r.choice((1, 1, 2, 3))):
        start = r.randrange(min(len(data), r.choice((64, 600, len(data)))) + 1)
        end = min(len(data), start + r.choice((1, 1, 2, 4, 8, 100, len(data))))
        part = data[start:end]
        way = r.choice(("flip", "flip", "noise", "ones", "zeros", "cut", "end", "twice"))
        r.said.append(f"{way} {start}:{end}")
        made = {
            "flip": bytes([part[0] ^ 1 << r.randrange(8)]) + part[1:] if part else b"\xff",
            "noise": r.randbytes(len(part)), "ones": b"\xff" * len(part),
            "zeros": bytes(len(part)), "cut": b"", "end": b"", "twice": part * 2,
        }[way]  # fmt: skip
        data = data[:start] + made + (b"" if way == "end" else data[end:])
    return data


def rearranged(r: Drawn, data: bytes) -> bytes:
    """A pickle with instructions removed, doubled or swapped, or with other arguments."""
    starts = [start for *_, start in pickletools.genops(data)]
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(r.choice((1, 1, 2, 3))):
        i, j = r.randrange(len(parts)), r.randrange(len(parts))
        way = r.choice(("remove", "twice", "swap", "copy", "argument", "argument"))
        r.said.append(f"{way} instructions {i}, {j}: {parts[i][:20]!r}, {parts[j][:20]!r}")
        if way == "argument":
            parts[i] = parts[i][:1] + bytes(b ^ 1 << r.randrange(8) for b in parts[i][1:])
        elif way == "swap":
            parts[i], parts[j] = parts[j], parts[i]
        else:
            parts[i] = {"remove": b"", "twice": parts[i] * 2, "copy": parts[j]}[way]
    return b"".join(parts)


def repickled(r: Drawn, data: bytes) -> bytes:
    """A pickle that takes the place of `data`: damaged, rearranged or crafted."""
    way = r.choice((damaged, rearranged, rearranged, None))
    if way is not None:
        return way(r, data)
    raw, prefix = r.choice(RAW), r.choice((b"", b"\x80\x02}U\x04data", b"\x80\x02}U\x05epoch"))
    r.said.append(f"crafted {prefix + raw[:40]!r}")
    return prefix + raw + (b"s." if prefix else b".")


def changed(r: Drawn, value: Any, others: list, where: str = "") -> Any:
    """`value` with one entry, at any depth, removed, added, or replaced by one of `others`."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    made = dict(value) if isinstance(value, dict) else list(value)
    key = r.choice(keys) if keys else None
    inner, other = None if key is None else value[key], r.choice(others)
    if isinstance(inner, (dict, list, tuple)) and r.random() < 0.8:
        made[key] = changed(r, inner, others, f"{where}/{key}")
        return made
    if type(other) is type(changed):  # one of TENSORS
        like = inner if isinstance(inner, torch.Tensor) else torch.zeros(3)
        try:
            other = other(like)
        except RuntimeError:  # not from a tensor of these dimensions
            other = like[..., None]
    way = r.choice(("remove", "add", "replace", "replace", "replace", "replace"))
    r.said.append(f"{way} {where}/{key}: {brief(other)}")
    if way == "remove" and keys:
        del made[key]
    elif way == "replace" and keys:
        made[key] = other
    elif isinstance(made, dict):
        names = "x", "x" * 10**5, "", "a\nb", "0", 1, None, (1, 2), b"x"
        made[r.choice(names[:5] if others is ANY else names)] = other
    else:
        made.insert(r.randrange(len(made) + 1), other)
    return made


def zipped(r: Drawn, data: bytes, change: Callable[[Drawn, bytes], bytes] | None) -> bytes:
    """An archive of torch.save with another pickle or other members, and right checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = [(info.filename, file.read(info)) for info in file.infolist()]
    i = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    i, way = (i, "pickle") if change else (r.randrange(len(members)), "")
    way = way or r.choice(("remove", "twice", "rename", "content", "code", "deflate"))
    name, content = members[i]
    other = r.choice(("", "archive/data.pkl", "../x", "archive/code/x.py", "x" * 999))
    r.said.append(f"{way} {name}")
    members[i : i + 1] = {
        "pickle": lambda: [(name, change(r, content))], "remove": lambda: [],
        "twice": lambda: [(name, content)] * 2, "rename": lambda: [(other, content)],
        "content": lambda: [(name, damaged(r, content))], "deflate": lambda: [(name, content)],
        "code": lambda: [(name, content), (other, content)],
    }[way]()  # fmt: skip
    made, how = io.BytesIO(), zipfile.ZIP_DEFLATED if way == "deflate" else zipfile.ZIP_STORED
    with zipfile.ZipFile(made, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content in members:
            file.writestr(zipfile.ZipInfo(name), content, how)
    return made.getvalue()


def torch_file(r: Drawn, content: dict) -> bytes:
    """A changed file of torch.save, of the zip format or of the one before PyTorch 1.6."""
    zip_format, way = r.random() < 0.7, r.choice(WAYS)
    protocol = r.choice((2, 2, 2, 2, 0, 1, 3, 4, 5))
    r.said.append(f"{way}, zip {zip_format}, protocol {protocol}")
    if way == "values":
        content = changed(r, content, r.choice((ANY, PICKLED, CALLS, TENSORS)))
    made = io.BytesIO()
    torch.save(content, made, pickle_protocol=protocol, _use_new_zipfile_serialization=zip_format)
    data = made.getvalue()
    if way == "bytes":
        return damaged(r, data)
    if zip_format and way in ("pickle", "members"):
        return zipped(r, data, repickled if way == "pickle" else None)
    if way in ("pickle", "members"):  # magic number, protocol, system, content, storages
        file, ends = io.BytesIO(data), [0]
        for _ in range(5):
            list(pickletools.genops(file))
            ends.append(file.tell())
        i = 3 if way == "pickle" else r.randrange(5)
        return data[: ends[i]] + repickled(r, data[ends[i] : ends[i + 1]]) + data[ends[i + 1] :]
    return data


def cifar_batches() -> dict[str, dict]:
    """Name → the content of a small batch, as CIFAR-10 has them."""
    rng, files = np.random.default_rng(0), {}
    for name in (*cifar.TRAIN, cifar.TEST):
        data = rng.integers(256, size=(7, 3072), dtype=np.uint8)
        labels = rng.integers(10, size=7).tolist()
        files[name] = {b"batch_label": name.encode(), b"labels": labels, b"data": data}
    names = [b"plane", b"car", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"van"]
    return files | {cifar.META: {b"num_cases_per_batch": 7, b"label_names": names}}


def images() -> tuple[list[bytes], list[bytes]]:
    """Images of the usual formats, and of all others that Pillow recognizes by their content."""
    usual, others = [], []
    noise = np.random.default_rng(0).integers(256, size=(SIDES[1], SIDES[0], 3), dtype=np.uint8)
    Image.init()
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F"):
        deep = mode in ("I;16", "I", "F")
        values = noise[..., 0].astype({"I;16": "u2", "I": "i4", "F": "f4"}[mode] if deep else "u1")
        image = Image.fromarray(values) if deep else Image.fromarray(noise).convert(mode)
        for name in sorted(Image.SAVE):
            packed = ("raw", "tiff_lzw", "tiff_adobe_deflate") if name == "TIFF" else (None,)
            for compression in packed:
                made = io.BytesIO()
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of formats that Pillow will drop
                        options = {"compression": compression} if compression else {}
                        image.save(made, name, **options)
                except Exception:  # the format has no such mode
                    continue
                known = name in ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM")
                (usual if known else others).append(made.getvalue())
    return usual, others


def png(width: int, height: int, depth: int, rows: bytes) -> bytes:
    """A gray PNG whose compressed rows are `rows`."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def checked(data: bytes) -> bytes:
    """A PNG with the right checksums."""
    made, place = data[:8], 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        body = data[place + 4 : place + 8 + size]
        made += data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + size
    return made


def resized(r: Drawn, data: bytes) -> bytes:
    """An image with another size in its header."""
    side, new = r.choice(SIDES), r.choice(HUGE)
    forms = {str(side).encode(): str(new).encode()}
    for form in (">I", "<I", ">H", "<H"):
        wide = struct.calcsize(form)
        forms[struct.pack(form, side)] = struct.pack(form, new & (1 << 8 * wide) - 1)
    places = [(m.start(), old) for old in forms for m in re.finditer(re.escape(old), data[:600])]
    if not places:
        return damaged(r, data)
    place, old = r.choice(places)
    r.said.append(f"size {side} at {place} to {new}")
    return data[:place] + forms[old] + data[place + len(old) :]


class Files:
    """The input of each kind: method `<kind>` writes it and returns its path."""

    def __init__(self, folder: Path) -> None:
        self.folder, valid = folder, folder / "valid.pt"
        if not valid.exists():
            out = folder / f"valid-{os.getpid()}"
            fit(training_cases.model(), training_cases.data(), RECIPE, out=out, spec=SPEC)
            os.replace(out / "checkpoints" / "epoch-0001.pt", valid)
        self.valid = torch.load(valid, weights_only=True)
        torch.manual_seed(0)
        net = resnet_fast.create_model(SPEC.name, **SPEC.options)
        self.model = {k: v for k, v in self.valid.items() if k != "training"}
        self.model["weights"] = dict(net.state_dict())
        self.tensors = dict(resnet_fast.create_model("cifar_resnet20", num_classes=4).state_dict())
        parallel = {f"module.{name}": value for name, value in self.tensors.items()}
        self.foreign = {"state_dict": parallel, "step": 3}
        self.batches = cifar_batches()
        self.images, self.others = images() if Image else ([], [])

    def write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    def checkpoint(self, r: Drawn) -> Path:
        return self.write("checkpoint.pt", torch_file(r, self.valid))

    def weights(self, r: Drawn) -> Path:
        way = r.random()
        if way < 0.6:
            return self.write("weights.pt", torch_file(r, self.model))
        if way < 0.85 or safetensors is None:
            return self.write("cifar_resnet20.pt", torch_file(r, self.foreign))
        data = safetensors.save(self.tensors)
        if way < 0.9:
            return self.write("cifar_resnet20.safetensors", damaged(r, data))
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps(changed(r, json.loads(data[8:end]), ANY)).encode()
        data = struct.pack("<Q", len(header)) + header + data[end:]
        return self.write("cifar_resnet20.safetensors", data)

    def cifar(self, r: Drawn) -> Path:
        form, name = r.choice(("folder", "tar", "tar.gz")), r.choice(cifar.WANTED)
        way, protocol = r.choice(("values", "values", "pickle", "member", "bytes")), r.randrange(6)
        r.said.append(f"{way} of {name}, {form}, protocol {protocol}")
        files = {key: pickle.dumps(value, protocol) for key, value in self.batches.items()}
        if way == "values":
            content = changed(r, self.batches[name], r.choice((ANY, PICKLED, CALLS, CALLS)))
            files[name] = pickle.dumps(content, protocol)
        elif way == "pickle":
            files[name] = repickled(r, files[name])
        if form != "folder":
            return self.write(f"cifar.{form}", archive(r, files, form, way, name))
        if way == "bytes":
            files[name] = damaged(r, files[name])
        path = self.folder / "cifar"
        shutil.rmtree(path, ignore_errors=True)
        for key, content in files.items():
            self.write(f"cifar/{key}", content)
        if way == "member":
            (path / name).unlink()
            kind = r.choice(("missing", "folder", "pipe", "link", "sparse"))
            r.said.append(kind)
            if kind == "folder":
                (path / name).mkdir()
            elif kind == "pipe":
                os.mkfifo(path / name)
            elif kind == "link":
                (path / name).symlink_to("/dev/zero")
            elif kind == "sparse":
                (path / name).touch()
                os.truncate(path / name, 1 << 40)
        return path

    def image(self, r: Drawn) -> Path:
        if r.random() < 0.02:
            depth, side = r.choice((1, 8, 16)), r.choice((9000, 13_000, 60_000))
            r.said.append(f"PNG of {side} × {side} zeros, {depth} bits")
            size = min(side, 13_000) * (min(side, 13_000) * depth // 8 + 1)
            return self.write("image.png", png(side, side, depth, zlib.compress(bytes(size), 1)))
        data, way = r.choice(self.images if r.random() < 0.8 else self.others), r.random()
        r.said.append(f"of {data[:12]!r}")
        data = resized(r, data) if way < 0.4 else damaged(r, data) if way < 0.97 else data
        png_too = data[:4] == b"\x89PNG" and r.random() < 0.7
        return self.write("image.png", checked(data) if png_too else data)

    def table(self, r: Drawn) -> Path:
        kind, way = r.choice(tuple(TABLES)), r.choice(("values", "values", "bytes", "crafted"))
        r.said.append(f"{way} of {kind}")
        if way == "values":
            data = json.dumps(changed(r, TABLES[kind], ANY)).encode()
        elif way == "bytes":
            data = damaged(r, json.dumps(TABLES[kind]).encode())
        else:
            data = r.choice((
                b"[" * 10**5, b'{"a":' * 10**5, b"9" * 10**5, b'{"a": {"b": {"us": 1e999}}}', b"",
                b"\xff\xfe", b'{"a": {"b": {"us": ' + b"9" * 10**4 + b"}}}", b" " * (17 << 20),
                b'{"\\ud800": 1}', b'{"a": {"\\u001b\\n": 1}}', b"\xef\xbb\xbf{}", b"null", b"{}",
            ))  # fmt: skip
        return self.write(f"{kind}/table.json", data)


def archive(r: Drawn, files: dict[str, bytes], form: str, way: str, name: str) -> bytes:
    """A tar archive of `files`; `way` "member" changes a header, "bytes" anything."""
    made = b""
    for key, content in files.items():
        member = tarfile.TarInfo(f"{cifar.FOLDER}/{key}")
        member.size = len(content)
        if way == "member" and key == name:
            member.type = r.choice([b"0", *(b"%c" % kind for kind in b"01256KLSZxg")])
            member.size = r.choice((0, 1, member.size, member.size + 1, 1 << 26, 1 << 32, 1 << 62))
            r.said.append(f"type {member.type!r}, size {member.size}")
        made += member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)
    made += bytes(1024)
    if way == "bytes" and r.random() < 0.5:
        made, way = damaged(r, made), ""
    if form == "tar.gz":
        made = gzip.compress(made, 1, mtime=0)
        if r.random() < 0.02:  # another 1.25 GiB of zeros
            r.said.append("bomb")
            made += gzip.compress(bytes(64 << 20), 1, mtime=0) * 20
    return damaged(r, made) if way == "bytes" else made


def read_checkpoint(path: Path) -> None:
    out = path.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    net, data = training_cases.model(), training_cases.data()
    history = fit(net, data, RECIPE, out=out, resume=path, spec=SPEC)
    steps = RECIPE.epochs * training_cases.STEPS
    assert (len(history.epochs), len(history.losses)) == (RECIPE.epochs, steps)


def read_weights(path: Path) -> None:
    loaded = load_weights(path, "cifar_resnet20" if "cifar" in path.name else None)
    with torch.no_grad():
        assert len(loaded.model(torch.zeros(1, loaded.preprocessing.channels, 32, 32))) == 1


def read_cifar(path: Path) -> None:
    names, *tensors = cifar.read_cifar10(path)
    assert names and [t.dim() for t in tensors] == [4, 1, 4, 1]


def read_the_image(path: Path) -> None:
    x = read_image(path, Preprocessing(8, 9, (0.5,) * 3, (0.5,) * 3))
    assert (x.shape, x.dtype) == ((3, 8, 8), torch.uint8)


def read_table(path: Path) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        table = tuning_tables.read(path)
    assert len(found) <= 1 and not (found and table)
    if found:
        raise ValueError(str(found[0].message))


READERS = dict(zip(KINDS, (read_checkpoint, read_weights, read_cifar, read_the_image, read_table),
                   strict=True))  # fmt: skip


def judge(kind: str, path: Path, error: Exception) -> str:
    """What is wrong with how a reader refused a file; "" if nothing is."""
    message = str(error)
    if not isinstance(error, ValueError):
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "resnet_fast" in Path(frame.filename).parts]
        at = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in [*own[-1:], frames[-1]])
        return f"{type(error).__name__} at {at}: {message[:200]}"
    if len(message.splitlines()) != 1:
        return f"a message of {len(message.splitlines())} lines: {message[:300]!r}"
    if len(message) >= LONGEST:
        return f"a message of {len(message)} characters: {message[:200]!r}"
    begins = kind in ("cifar", "image")
    if not (message.startswith(str(path)) if begins else str(path) in message):
        return f"a message that does not name the file: {message!r}"
    return f"an allocation failed: {message!r}" if NO_MEMORY.search(message) else ""


def check(kind: str, path: Path) -> tuple[bool, str]:
    """Whether the reader accepts a file, and the violation if there is one."""
    accepted, wrong, marker = False, "", Path(MARKER)
    marker.unlink(missing_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[kind](path)
        accepted = True
    except Exception as error:
        wrong = judge(kind, path, error)
    return accepted, f"code of the file ran {wrong}" if marker.exists() else wrong


def work() -> None:
    """A worker: its inputs one by one, a line of JSON before and after each."""
    torch.set_num_threads(1)
    faulthandler.enable()
    faulthandler.register(signal.SIGXCPU, chain=True)
    folder = Path.cwd()
    gs = folder / "gs"  # Ghostscript, which Pillow runs for PostScript, is code too
    gs.write_text(f"#!/bin/sh\necho > {folder / MARKER}\n")
    gs.chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    files = Files(folder)
    READERS["checkpoint"](folder / "valid.pt")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for seed in json.loads(sys.stdin.read()):
        print(json.dumps({"begins": seed}), flush=True)
        kind, r = KINDS[seed % len(KINDS)], Drawn(seed)
        if kind == "image" and Image is None:
            continue
        path = getattr(files, kind)(r)
        start = time.process_time()
        most = math.ceil(start) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        faulthandler.dump_traceback_later(STUCK, exit=True)
        accepted, wrong = check(kind, path)
        faulthandler.cancel_dump_traceback_later()
        told = {"accepted": accepted, "wrong": wrong, "seconds": time.process_time() - start}
        print(json.dumps({"seed": seed, "said": r.said, **told}), flush=True)


@dataclass
class Tally:
    """What became of the inputs."""

    counts: Counter = field(default_factory=Counter)
    wrong: list[tuple[str, int]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, 0)

    def fail(self, seed: int, why: str) -> None:
        self.wrong.append((f"{KINDS[seed % len(KINDS)]}: {why}", seed))
        print(f"seed {seed}: {why}", file=sys.stderr, flush=True)


def run(todo: list[int], folder: Path, tally: Tally, verbose: bool = False) -> None:
    """Workers for the seeds `todo`, a new one after CHUNK inputs and after each that dies."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, *INTERPRETER, "--worker"]
    while todo:
        given, seed = todo[:CHUNK], None
        with open(folder / "errors", "w+") as errors:
            worker = subprocess.Popen(command, cwd=folder, text=True, stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, stderr=errors)  # fmt: skip
            worker.stdin.write(json.dumps(given))
            worker.stdin.close()
            for line in worker.stdout:
                told = json.loads(line)
                if "begins" in told:
                    seed = told["begins"]
                    todo = todo[1:]
                    continue
                kind = KINDS[seed % len(KINDS)]
                tally.counts[kind, "accepted" if told["accepted"] else "refused"] += 1
                tally.slowest = max(tally.slowest, (told["seconds"], seed))
                if told["wrong"]:
                    tally.fail(seed, told["wrong"])
                if verbose:
                    print(json.dumps(told, indent=1))
                seed = None
            status = worker.wait()
            errors.seek(0)
            text = [line.strip() for line in errors if line.strip()]
        if seed is not None:
            where = "; ".join(line for line in text if "resnet_fast" in line)[:300]
            why = f"the process died: status {status} {where or text[-3:]}"
            tally.counts[KINDS[seed % len(KINDS)], "died"] += 1
            tally.fail(seed, why)
        elif status != 0:
            raise RuntimeError(f"a worker does not start: status {status}: {text[-10:]}")


def parser() -> argparse.ArgumentParser:
    what = __doc__.splitlines()[0]
    words = argparse.ArgumentParser("python tests/fuzz_files.py", description=what)
    words.add_argument("--inputs", type=int, default=1000, help="number of seeds")
    words.add_argument("--seed", type=int, default=0, help="the first seed")
    words.add_argument("--kind", choices=KINDS, help="the seeds of this kind alone")
    words.add_argument("--one", type=int, help="the input of this seed alone; its file is kept")
    words.add_argument("--jobs", type=int, default=2, help="processes at a time")
    words.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return words


def main(words: list[str] | None = None) -> int:
    args = parser().parse_args(words)
    if args.worker:
        work()
        return 0
    tally, start, kinds = Tally(), time.monotonic(), [args.kind] if args.kind else KINDS
    if args.one is not None:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-files-"))
        run([args.one], folder, tally, verbose=True)
        print(f"the file is in {folder}")
    else:
        todo = [seed for seed in range(args.seed, args.seed + args.inputs)
                if KINDS[seed % len(KINDS)] in kinds]  # fmt: skip
        with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(args.jobs) as pool:
            parts = [todo[job :: args.jobs] for job in range(args.jobs)]
            folders = [Path(made) / str(job) for job in range(args.jobs)]
            list(pool.map(run, parts, folders, [tally] * args.jobs))
    for kind in kinds if args.one is None else [KINDS[args.one % len(KINDS)]]:
        found = [f"{tally.counts[kind, what]} {what}" for what in ("accepted", "refused", "died")]
        print(f"{kind:10}", ", ".join(found))
    for why, seed in sorted(tally.wrong):
        print(f"\n{why}\n  python tests/fuzz_files.py --one {seed}")
    seconds, seed = tally.slowest
    print(f"\n{tally.counts.total()} inputs, {len(tally.wrong)} violations, in "
          f"{time.monotonic() - start:.0f} s; at most {seconds:.1f} s of CPU time, seed {seed}")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
