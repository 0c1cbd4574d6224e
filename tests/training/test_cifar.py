"""CIFAR-10's reader: any file is read as its numbers or refused by name, at a bounded cost."""

import codecs
import gzip
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch

from resnet_fast.training import cifar
from resnet_fast.training.cifar import FILE_BYTES, FOLDER, META, TEST, TRAIN, WANTED, read_cifar10

N = 3
LABELS = [2, 0, 1]
CLASSES = [b"cat", b"dog", "été".encode()]
DATA = {
    name: np.random.default_rng(i).integers(256, size=(N, 3072), dtype=np.uint8)
    for i, name in enumerate((*TRAIN, TEST))
}
FIRST = TRAIN[0]


def pickled(protocol=4, **changed):
    """Name → the pickle of each file; `changed` replaces values, or a whole file by its bytes."""
    files = {name: {b"data": data, b"labels": LABELS} for name, data in DATA.items()}
    files[META] = {b"label_names": CLASSES}
    for key in ("data", "labels"):
        if key in changed:
            files[FIRST][key.encode()] = changed[key]
    if "label_names" in changed:
        files[META][b"label_names"] = changed["label_names"]
    content = {name: pickle.dumps(value, protocol) for name, value in files.items()}
    return content | {name: changed[name] for name in WANTED if name in changed}


def write(path, files):
    """`files` as a folder or, by the suffix of `path`, as a tar archive. Returns `path`."""
    if not path.suffix:
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def assert_read(path):
    """`path` holds exactly CLASSES, DATA and LABELS."""
    classes, train_x, train_y, test_x, test_y = read_cifar10(path)
    assert classes == ("cat", "dog", "été")
    assert (train_x.dtype, train_y.dtype, test_y.dtype) == (torch.uint8, torch.int64, torch.int64)
    wanted = np.concatenate([DATA[name] for name in TRAIN]).reshape(-1, 3, 32, 32)
    assert np.array_equal(train_x.numpy(), wanted)
    assert np.array_equal(test_x.numpy(), DATA[TEST].reshape(-1, 3, 32, 32))
    assert train_y.tolist() == LABELS * 5
    assert test_y.tolist() == LABELS


def refusal(path):
    """The message of the ValueError that reading `path` raises: one short line that names it."""
    with pytest.raises(ValueError) as raised:
        read_cifar10(path)
    message = str(raised.value)
    assert type(raised.value) is ValueError
    assert message.startswith(str(path))
    assert message.isprintable()  # in one line
    assert len(message) < len(str(path)) + 300
    assert "MemoryError" not in message
    return message


@pytest.fixture
def in_time():
    """Fail a test that takes over 20 seconds, also in a system call."""

    def stop(*_):
        raise BaseException("no end after 20 seconds")  # which the reader does not catch

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def of_numpy_1(content, protocol):
    """The pickle with the names of NumPy's functions before 2.0, without a frame."""
    if protocol < 4:
        return content.replace(b"numpy._core", b"numpy.core")
    assert content[2:3] == pickle.FRAME
    content = content[:2] + content[11:]
    for name in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        old = name.replace(b"_core", b"core")
        content = content.replace(bytes([len(name)]) + name, bytes([len(old)]) + old)
    return content


@pytest.mark.parametrize("name", ["cifar.tar.gz", "cifar.tar", "cifar"])
@pytest.mark.parametrize("numpy", [1, 2])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_every_protocol_of_python_3(tmp_path, protocol, numpy, name):
    files = pickled(protocol)
    if numpy == 1:
        files = {name: of_numpy_1(content, protocol) for name, content in files.items()}
        assert not any(b"numpy._core" in content for content in files.values())
    assert_read(write(tmp_path / name, files))


def python_2(data, labels):
    """A batch as Python 2 pickles it, in protocol 0 and in 2; strings in it are bytes."""
    text = "".join(f"\\x{byte:02x}" for byte in data.tobytes())
    old = (f"(dp1\nS'data'\np2\ncnumpy.core.multiarray\n_reconstruct\np3\n(cnumpy\nndarray\np4\n"
           f"(I0\ntS'b'\ntRp5\n(I1\n(L{len(data)}L\nI3072\ntcnumpy\ndtype\np6\n(S'u1'\nI0\nI1\ntRp7"
           f"\n(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'{text}'\np8\ntbsS'labels'\np9\n(lp10\n"
           f"{''.join(f'I{label}' + chr(10) + 'a' for label in labels)}s.").encode()  # fmt: skip
    new = (b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03"
           b"cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01\x8a\x01" + bytes([len(data)]) +
           b"M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff"
           b"\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + (data.size).to_bytes(4, "little") +
           data.tobytes() + b"tbU\x06labelsq\x08]q\x09(" +
           b"".join(b"K" + bytes([label]) for label in labels) + b"eu.")  # fmt: skip
    return old, new


@pytest.mark.parametrize("protocol", [0, 2])
def test_python_2(tmp_path, protocol):
    files = {name: python_2(data, LABELS)[protocol // 2] for name, data in DATA.items()}
    assert_read(write(tmp_path / "cifar.tar.gz", {**pickled(2), **files}))


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    "changed",
    [
        {"labels": np.array(LABELS)},
        {"labels": np.array(LABELS, np.uint8)},
        {"labels": np.array(LABELS, ">i4")},
        {"data": np.asfortranarray(DATA[FIRST])},
        {"label_names": [name.decode() for name in CLASSES]},
    ],
    ids=["int64", "uint8", "big-endian", "Fortran order", "names as str"],
)
def test_other_forms_with_the_same_meaning(tmp_path, changed, protocol):
    assert_read(write(tmp_path / "cifar", pickled(protocol, **changed)))


def nested(times):
    """A list whose text has 2**times characters, of that many lists."""
    value = []
    for _ in range(times):
        value = [value, value]
    return value


def deep(levels=100_000):
    """The pickle of a list in a list in a list…"""
    return b"]" * levels + b"a" * (levels - 1)


RANGE = "data_batch_1: expected labels from 0 to 2 as integers"
ONE_EACH = "data_batch_1: expected 3072 bytes and one label per image"
NAMES = "batches.meta has no label_names that are a list of strings in UTF-8"
DICT = "data_batch_1: not a CIFAR-10 batch: expected a dict, got "


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"labels": 1}, ONE_EACH),
        ({"labels": b"abc"}, ONE_EACH),
        ({"labels": {0: 1, 1: 1, 2: 1}}, "expected only strings as the keys of a dict"),
        ({"labels": None}, ONE_EACH),
        ({"labels": LABELS[:2]}, ONE_EACH),
        ({"labels": nested(60)}, ONE_EACH),
        ({"labels": np.array(1)}, ONE_EACH),
        ({"labels": np.array([LABELS] * 3)}, ONE_EACH),
        ({"labels": np.array(LABELS, np.float32)}, RANGE),
        ({"labels": np.array([True, False, True])}, RANGE),
        ({"labels": np.array([0, 1, 3])}, RANGE),
        ({"labels": np.array([0, 1, 2**64 - 1], np.uint64)}, RANGE),
        ({"labels": ["0", "1", "2"]}, RANGE),
        ({"labels": [True, False, True]}, RANGE),
        ({"labels": [0.0, 1.0, 2.0]}, RANGE),
        ({"labels": [[0], [1], [2]]}, RANGE),
        ({"labels": [0, 1, nested(60)]}, RANGE),
        ({"labels": [0, 1, 10**6000]}, RANGE),
        ({"labels": [0, 1, -1]}, RANGE),
        ({"labels": [0, 1, 3]}, RANGE),
        ({"labels": [0, 1, np.array(2)]}, RANGE),
        ({"label_names": CLASSES[:2]}, "expected labels from 0 to 1 as integers"),
        ({"label_names": b"cat"}, NAMES),
        ({"label_names": "cat"}, NAMES),
        ({"label_names": 3}, NAMES),
        ({"label_names": []}, NAMES),
        ({"label_names": None}, NAMES),
        ({"label_names": [b"cat", b"dog", 3]}, NAMES),
        ({"label_names": [b"cat", b"dog", b"\xff"]}, NAMES),
        ({"label_names": ["cat", "dog", "\ud800"]}, NAMES),
        ({"label_names": [b"cat", b"dog", nested(60)]}, NAMES),
        ({"label_names": np.zeros(3)}, NAMES),
        ({META: pickle.dumps({})}, NAMES),
        ({"data": DATA[FIRST].tolist()}, ONE_EACH),
        ({"data": DATA[FIRST].tobytes()}, ONE_EACH),
        ({"data": None}, ONE_EACH),
        ({"data": DATA[FIRST].astype(np.int8)}, ONE_EACH),
        ({"data": DATA[FIRST].astype(np.float64)}, ONE_EACH),
        ({"data": DATA[FIRST][:, :3000].copy()}, ONE_EACH),
        ({"data": DATA[FIRST].reshape(N, 3, 1024)}, ONE_EACH),
        ({"data": DATA[FIRST].reshape(-1)}, ONE_EACH),
        ({"data": DATA[FIRST][:2]}, ONE_EACH),
        ({FIRST: pickle.dumps({})}, ONE_EACH),
        ({FIRST: pickle.dumps([1])}, DICT + "list"),
        ({FIRST: pickle.dumps(b"data")}, DICT + "bytes"),
        ({FIRST: pickle.dumps(nested(60))}, DICT + "list"),
        ({FIRST: deep() + b"."}, DICT + "list"),
        ({FIRST: b"}C\x06labels" + deep() + b"s."}, ONE_EACH),
        ({FIRST: b""}, "data_batch_1: not a CIFAR-10 batch: EOFError"),
        ({FIRST: b"A text"}, "expected only instructions for arrays and plain values"),
        ({FIRST: b"c\x1b[31m\nred\n."}, "contains \\x1b[31m.red; expected arrays"),
        ({FIRST: b"F" + b"\x1b[31m" * 1000 + b"\n."}, "data_batch_1: not a CIFAR-10 batch: "),
    ],
)
def test_wrong_contents_are_named(tmp_path, in_time, changed, says):
    assert says in refusal(write(tmp_path / "cifar", pickled(**changed)))


class Reduced:
    """An object that is pickled as the call of a function, perhaps with a state."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


RECONSTRUCT = np.zeros(0).__reduce__()[0]
FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
U1 = np.dtype("u1")
NO_FORM = "expected an array in the form that NumPy pickles"
NO_NUMBERS = "expected an array of numbers"
NO_SHAPE = "expected an array whose shape agrees with its bytes"


def array(state, *arguments):
    return Reduced(RECONSTRUCT, arguments or (np.ndarray, (0,), b"b"), state)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.array([None]), NO_FORM),
        (np.zeros(1, "V8"), NO_NUMBERS),
        (np.zeros(1, [("f", "u1")]), NO_NUMBERS),
        (np.array(["a"]), NO_NUMBERS),
        (np.array([b"a"]), NO_NUMBERS),
        (np.zeros(1, "M8[s]"), NO_NUMBERS),
        (np.zeros(1, complex), NO_NUMBERS),
        (np.zeros(1, np.longdouble), NO_NUMBERS),
        (array((1, (2,), np.dtype("O"), False, b"A" * 16)), NO_NUMBERS),
        (array((1, (2,), "u1", False, b"ab")), NO_FORM),
        (array((1, (2,), Reduced(np.dtype, ("u1",)), False, b"ab")), NO_NUMBERS),
        (array((1, (2,), Reduced(np.dtype, ("u1",), (3, "|", 0, 0, 0, 1, 1, 63)), False, b"ab")),
         NO_NUMBERS),
        (array((1, (2,), Reduced(np.dtype, (1,), (3, 2, *[None] * 3, -1, -1, 0)), False, b"ab")),
         NO_NUMBERS),
        (array((1, (3,), U1, False, b"ab")), NO_SHAPE),
        (array((1, (1,), U1, False, b"ab")), NO_SHAPE),
        (array((1, (-1,), U1, False, b"ab")), NO_SHAPE),
        (array((1, (-1, -2), U1, False, b"ab")), NO_SHAPE),
        (array((1, (0, 2**64), U1, False, b"")), NO_SHAPE),
        (array((1, (True, 2), U1, False, b"ab")), NO_SHAPE),
        (array((1, (2.0,), U1, False, b"ab")), NO_SHAPE),
        (array((1, [2], U1, False, b"ab")), NO_FORM),
        (array((1, (1,) * 100, U1, False, b"a")), NO_SHAPE),
        (array((1, (2,), U1, False, "ab")), NO_FORM),
        (array((1, (2,), U1, False, [1, 2])), NO_FORM),
        (array((2, (2,), U1, False, b"ab")), NO_FORM),
        (array((1, (2,), U1, "C", b"ab")), NO_FORM),
        (array(((2,), U1, False, b"ab")), NO_FORM),
        (array(nested(60)), NO_FORM),
        (array((1, (2,), U1, False, b"ab"), np.ndarray, (2,), b"b"), NO_FORM),
        (array((1, (2,), U1, False, b"ab"), np.ndarray, (0,), b"O"), NO_FORM),
        (Reduced(RECONSTRUCT, (np.ndarray, (0,), b"b")), NO_FORM),
        (Reduced(np.ndarray, ((2,), U1, b"ab")), NO_FORM),
        (Reduced(FROM_BUFFER, (b"A" * 16, np.dtype("O"), (2,), "C")), NO_NUMBERS),
        (Reduced(FROM_BUFFER, (b"ab", U1, (3,), "C")), NO_SHAPE),
        (Reduced(FROM_BUFFER, (b"ab", U1, (2,), "A")), NO_FORM),
        (Reduced(codecs.encode, ("ab", "utf-8")), NO_FORM),
        (Reduced(codecs.encode, (nested(60), "latin1")), NO_FORM),
        (Reduced(print, ("harm",)), "contains builtins.print; expected arrays"),
        (Reduced(os.system, ("echo harm",)), "contains posix.system; expected arrays"),
        (Reduced(np.load, ("file",)), "expected arrays and plain values"),
        (np.float64(1), "contains numpy"),
        (print, "contains builtins.print; expected arrays"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["data", "label_names"])
def test_an_array_in_another_form_is_refused(tmp_path, in_time, capfd, key, value, says):
    message = refusal(write(tmp_path / "cifar", pickled(**{key: value})))
    assert f"{FIRST if key == 'data' else META}: not a CIFAR-10 batch: " in message
    assert says in message
    assert capfd.readouterr().out == ""


# From bytes of the file, NumPy itself makes an array of pointers (O), or a field of them (V).
POINTERS = {
    "O": b"cnumpy\nndarray\n((I1\ntcnumpy\ndtype\n(S'O'\ntRC\x08" + b"A" * 8 + b"tR",
    "V": b"cnumpy\nndarray\n((I1\ntcnumpy\ndtype\n(S'V8'\nI0\nI1\ntR(I3\nS'|'\nN(S'f'\nt(dS'f'\n"
         b"(cnumpy\ndtype\n(S'O'\ntRI0\ntsI8\nI1\nI0\ntbC\x08" + b"A" * 8 + b"tR",
}  # fmt: skip


@pytest.mark.parametrize("pointers", POINTERS.values(), ids=POINTERS)
def test_pointers_in_a_pickle_are_not_followed(tmp_path, pointers):
    names = write(tmp_path / "names", pickled(**{META: b"(dC\x0blabel_names" + pointers + b"s."}))
    assert f"{META}: not a CIFAR-10 batch: {NO_FORM}" in refusal(names)
    data = pickle.dumps(DATA[FIRST], 0)[:-1]
    batch = b"(dC\x06labels" + pointers + b"sC\x04data" + data + b"s."
    labels = write(tmp_path / "labels", pickled(**{FIRST: batch}))
    assert f"{FIRST}: not a CIFAR-10 batch: {NO_FORM}" in refusal(labels)
    batch = batch.replace(pointers, b"(lI1\naI1\na" + pointers + b"a")
    assert RANGE in refusal(write(tmp_path / "label", pickled(**{FIRST: batch})))


def test_the_state_of_a_function_is_not_set(tmp_path):
    content = b"cnumpy\ndtype\n}S'harm'\nI1\nsb."
    path = write(tmp_path / "cifar", pickled(**{META: content}))
    assert "expected the state of an array" in refusal(path)


def encoded_often(times, size):
    """A pickle that encodes one text many times."""
    text = b"X" + size.to_bytes(4, "little") + b"a" * size + b"q\x00"
    return (b"\x80\x02" + text + b"c_codecs\nencode\nq\x01X\x06\x00\x00\x00latin1q\x02"
            + b"h\x01h\x00h\x02\x86R" * times + b".")  # fmt: skip


LIMIT = "expected only instructions for arrays and plain values"
BOMBS = {
    "memo": (b"Nr\x00\x00\x00\x80.", "expected a dict"),
    "bytearray": (b"\x96\x00\x00\x00\x00\x02\x00\x00\x00a", "EOFError"),
    "frame": (b"\x95\x00\x00\x00\x00\x02\x00\x00\x00N.", "expected a dict"),
    "bytes": (b"\x8e\x00\x00\x00\x00\x02\x00\x00\x00a", "EOFError"),
    "dicts": (b"}" * FILE_BYTES, LIMIT),
    "marks": (b"(" * FILE_BYTES, LIMIT),
    "memos": (b"N" + b"\x94" * (FILE_BYTES - 1), LIMIT),
    "encode": (encoded_often(200, 20 << 20), "expected a dict"),
    "key": (b"})" + b"2\x86" * 60 + b"Ns.", "expected only strings as the keys"),
    "keys": (b"}()" + b"2\x86" * 60 + b"Nu.", "expected only strings as the keys"),
    "dict": (b"()" + b"2\x86" * 60 + b"Nd.", "expected only strings as the keys"),
    "set": (b"\x8f()" + b"2\x86" * 60 + b"\x90.", LIMIT),
    "frozenset": (b"()" + b"2\x86" * 60 + b"\x91.", LIMIT),
}

# argv: the paths to read. Prints what each says; an allocation over one GiB fails.
MEASURED = """
import resource, sys
from pathlib import Path
from resnet_fast.training.cifar import read_cifar10
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for path in sys.argv[1:]:
    try:
        print("read", read_cifar10(Path(path))[0])
    except ValueError as error:
        print(error)
"""


def measured(*paths):
    """What reading each path says, in a process that can allocate one GiB."""
    command = [sys.executable, "-c", MEASURED, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures by /proc")
def test_memory_and_time_of_a_pickle_are_bounded(tmp_path):
    paths = [
        write(tmp_path / name, pickled(**{FIRST: content})) for name, (content, _) in BOMBS.items()
    ]
    for path, line, (_, says) in zip(paths, measured(*paths), BOMBS.values(), strict=True):
        assert line.startswith(f"{path}: {FIRST}: not a CIFAR-10 batch: ")
        assert says in line


def header(name, size, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures by /proc")
def test_memory_and_time_of_an_archive_are_bounded(tmp_path):
    files = gzip.compress(write(tmp_path / "cifar.tar", pickled()).read_bytes())
    zeros, size = gzip.compress(bytes(64 << 20), 1) * 17, 17 * (64 << 20)
    kinds = (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, b"?")
    paths = [tmp_path / f"{i}.tar.gz" for i in range(len(kinds) + 2)]
    for path, kind in zip(paths, kinds, strict=False):
        path.write_bytes(gzip.compress(header("large", size, kind)) + zeros + files)
    paths[-2].write_bytes(files + zeros)  # after the end of the archive
    paths[-1].write_bytes(gzip.compress(header(FIRST, FILE_BYTES + 1)) + zeros + files)
    *large, batch = measured(*paths)
    for path, line in zip(paths[:-1], large, strict=True):
        assert line == f"{path}: damaged, or not a tar archive: unpacks to more than 1024 MiB"
    assert batch.startswith(f"{paths[-1]}: {FIRST}: has {FILE_BYTES + 1} bytes; expected at most")


def test_other_members_are_skipped(tmp_path, monkeypatch):
    content = write(tmp_path / "cifar.tar", pickled()).read_bytes()
    before = header("folder/", 0, tarfile.DIRTYPE) + header("link", 5, tarfile.LNKTYPE)
    before += header("readme", 700) + bytes(1024) + header("x", 3, tarfile.XHDTYPE) + bytes(512)
    (tmp_path / "more.tar").write_bytes(before + content)
    assert_read(tmp_path / "more.tar")
    monkeypatch.setattr(cifar, "ARCHIVE_BYTES", len(before + content) - 1)
    assert "unpacks to more than" in refusal(tmp_path / "more.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_no_file_is_not_read(tmp_path, in_time, kind):
    files = pickled()
    (tmp_path / TEST).write_bytes(files.pop(TEST))
    path = write(tmp_path / "cifar.tar", files)
    member = tarfile.TarInfo(f"{FOLDER}/{TEST}")
    member.type, member.linkname = kind, str(tmp_path / TEST)
    path.write_bytes(member.tobuf() + path.read_bytes())
    assert refusal(path).endswith("has no test_batch; expected the python version of CIFAR-10")


def test_a_large_file_in_a_folder_is_refused(tmp_path):
    path = write(tmp_path / "cifar", pickled())
    os.truncate(path / META, FILE_BYTES + 1)
    assert f"{META}: has {FILE_BYTES + 1} bytes; expected at most {FILE_BYTES}" in refusal(path)


def test_a_member_of_a_negative_size_is_refused(tmp_path, in_time):
    path = write(tmp_path / "cifar.tar", pickled())
    path.write_bytes(header(FIRST, -512) + path.read_bytes())
    assert f"{FIRST}: has -512 bytes" in refusal(path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("cifar.tar.gz", lambda content: content[:-8]),
        ("cifar.tar.gz", lambda content: content[:-8] + b"\1\2\3\4" + content[-4:]),
        ("cifar.tar.gz", lambda content: content[: len(content) // 2]),
        ("cifar.tar.gz", lambda content: content[:5]),
        ("cifar.tar", lambda content: content[: len(content) // 2]),
        ("cifar.tar", lambda content: content[:700]),
        ("cifar.tar", lambda content: content.rstrip(b"\0")),
        ("cifar.tar", lambda content: b"a" + content[1:]),
        ("cifar.tar", lambda content: header("x", 2**80) + content),
        ("cifar.tar", lambda content: header("x", 5, tarfile.GNUTYPE_SPARSE)[:-30] + b"\xff" * 30),
        ("cifar.tar", lambda content: b""),
        ("cifar.tar", lambda content: b"a text " * 100),
        ("cifar.tar", lambda content: b"PK\3\4" + content),
    ],
)
def test_a_damaged_archive_is_named(tmp_path, in_time, name, damage):
    path = write(tmp_path / name, pickled())
    path.write_bytes(damage(path.read_bytes()))
    assert refusal(path).startswith(f"{path}: damaged, or not a tar archive: ")


def test_a_pipe_or_device_is_named(tmp_path, in_time):
    os.mkfifo(tmp_path / "pipe")
    what = "expected a regular file, got a folder, pipe or device"
    assert what in refusal(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    assert what in refusal(tmp_path / "device")
    path = write(tmp_path / "cifar", pickled())
    (path / TEST).unlink()
    assert f"{TEST}: No such file" in refusal(path)
    os.mkfifo(path / TEST)
    assert f"{TEST}: {what}" in refusal(path)
    (path / TEST).unlink()
    (path / TEST).mkdir()
    assert f"{TEST}: {what}" in refusal(path)
    assert "no such file or folder" in refusal(tmp_path / "nothing")
    assert "no such file or folder" in refusal(path / META / "below")
    assert "no such file or folder" in refusal(tmp_path / ("long" * 100))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_damaged_pickle_is_read_or_named(tmp_path, in_time, protocol):
    """Random bytes anywhere but in the pixels."""
    rng = random.Random(protocol)
    path = write(tmp_path / "cifar", pickled())
    data = np.full((1, 3072), 65, np.uint8)
    batch = {b"data": data, b"labels": [1], b"n": [b"x", 1, 2.5, "y", None, {}, (1, 2)]}
    before, pixels, after = pickle.dumps(batch, protocol).partition(data.tobytes())
    read = 0
    for _ in range(500):
        parts = [bytearray(before), bytearray(after)]
        for _ in range(rng.choice((1, 1, 2, 5))):
            part = rng.choice(parts)
            part[rng.randrange(len(part))] = rng.randrange(256)
        (path / FIRST).write_bytes(parts[0] + pixels + parts[1])
        try:
            read_cifar10(path)
            read += 1
        except ValueError as error:
            assert str(error).startswith(f"{path}: {FIRST}: ")
    assert 0 < read < 500
