"""Weights from files as training scripts write them: wrappers, prefixes, heads, damage."""

import argparse
import copy
import os
import pickle
import types
import zipfile
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.training import checkpoint, state_dicts
from resnet_fast.training.checkpoint import ModelSpec
from resnet_fast.training.torch_file import CheckpointError, Unread, read_any
from resnet_fast.training.weights import load_weights, read_names

NAME = "cifar_preact_resnet110"  # no other model has its names and shapes
CLASSES = 7


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return resnet_fast.create_model(NAME, num_classes=CLASSES)


@pytest.fixture
def saved(tmp_path, net):
    """save(content, **options) → path; without content, the state dict of `net`."""

    def save(content=None, name="weights.pth", **options):
        path = tmp_path / name
        torch.save(net.state_dict() if content is None else content, path, **options)
        return path

    return save


def prefixed(weights, prefix):
    return OrderedDict((prefix + key, value) for key, value in weights.items())


def headless(weights):
    return {key: value for key, value in weights.items() if not key.startswith("fc.")}


def renamed(weights, head):
    return {
        f"{head}.{key[3:]}" if key.startswith("fc.") else key: v for key, v in weights.items()
    }


def assert_loaded(loaded, net, head=True):
    assert loaded.name == NAME
    wanted = net.state_dict()
    for key, value in loaded.model.state_dict().items():
        if head or not key.startswith("fc."):
            assert torch.equal(value, wanted[key]), key


# How training scripts write a state dict: what is in the file, and where the weights are.
WRAPPED = {
    "torchvision": (lambda w: w, ""),
    "imagenet example": (
        lambda w: {
            "epoch": 90, "arch": "resnet18", "state_dict": prefixed(w, "module."),
            "best_acc1": torch.tensor(71.2), "optimizer": {"state": {}, "param_groups": []},
        }, "state_dict.module",
    ),
    "timm": (
        lambda w: {
            "epoch": 3, "arch": "resnet18", "state_dict": w, "version": 2, "metric": 70.1,
            "args": argparse.Namespace(lr=0.1, model="resnet18"),
        }, "state_dict",
    ),
    "lightning": (
        lambda w: {
            "epoch": 1, "global_step": 10, "pytorch-lightning_version": "2.4.0",
            "state_dict": {**prefixed(w, "model."), "criterion.weight": torch.ones(7)},
            "hyper_parameters": {"path": Unpickled(), "lr": 0.1}, "loops": {}, "callbacks": {},
        }, "state_dict.model",
    ),
    "compiled": (lambda w: prefixed(w, "_orig_mod."), "_orig_mod"),
    "ddp of compiled": (lambda w: {"model": prefixed(w, "module._orig_mod.")},
                        "model.module._orig_mod"),
    "net": (lambda w: {"net": w, "acc": 91.0, "epoch": 4}, "net"),
    "nested": (lambda w: {"model": {"state_dict": prefixed(w, "backbone.")}},
               "model.state_dict.backbone"),
    "ema": (lambda w: {"ema": w}, "ema"),
    "model_ema": (lambda w: {"model_ema": prefixed(w, "module."), "n": np.float64(3)},
                  "model_ema.module"),
    "averaged": (lambda w: {"n_averaged": torch.tensor(3), **prefixed(w, "module.")}, "module"),
    "dino": (
        lambda w: {"student": prefixed(w, "module.backbone."),
                   "teacher": prefixed(w, "backbone."), "epoch": 3}, "teacher.backbone",
    ),
    "encoder": (lambda w: prefixed(w, "encoder."), "encoder"),
}  # fmt: skip


class Unpickled:
    """A class that reading must not import or call."""

    def __reduce__(self):
        return os.mkdir, ("was-called",)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_state_dicts_load(saved, net, kind, old, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrap, key = WRAPPED[kind]
    path = saved(wrap(net.state_dict()), _use_new_zipfile_serialization=not old)
    if kind == "lightning":
        with pytest.raises(CheckpointError, match=r"it contains posix\.mkdir, which resnet_fast"):
            load_weights(path)
        content = wrap(net.state_dict())
        content["hyper_parameters"]["path"] = types.SimpleNamespace(lr=1)
        path = saved(content, _use_new_zipfile_serialization=not old)
    loaded = load_weights(path)
    assert_loaded(loaded, net)
    assert bool(loaded.notes) == bool(key)
    if key:
        assert loaded.notes[0].startswith(f"{path}: took {key}")
    assert_loaded(load_weights(path, key=key or None), net)
    assert not (tmp_path / "was-called").exists()


def test_moco_and_simclr(saved, net):
    """The query encoder; its projection head is not a classification head."""
    body = headless(net.state_dict())
    mlp = {"fc.0.weight": torch.ones(64, 64), "fc.0.bias": torch.ones(64),
           "fc.2.weight": torch.ones(128, 64), "fc.2.bias": torch.ones(128)}  # fmt: skip
    moco = {
        **prefixed({**body, **mlp}, "module.encoder_q."),
        **prefixed({k: v + 1 for k, v in body.items()}, "module.encoder_k."),
        "module.queue": torch.ones(128, 64), "module.queue_ptr": torch.zeros(1).long(),
    }  # fmt: skip
    path = saved({"epoch": 1, "arch": "resnet50", "state_dict": moco})
    with pytest.raises(ValueError, match=r"the head has module\.encoder_q\.fc\.0\.w.*fc\.weight"):
        load_weights(path)
    loaded = load_weights(path, classes=("cat", "dog", "cow"))
    assert_loaded(loaded, net, head=False)
    assert loaded.model.fc.weight.shape == (3, 64)
    assert "took state_dict.module.encoder_q" in loaded.notes[0]
    assert "a new head of 3 classes replaces it" in loaded.notes[1]
    other = load_weights(path, key="state_dict.module.encoder_k", classes=("a", "b"))
    assert torch.equal(other.model.conv1.weight, net.conv1.weight + 1)
    simclr = saved({"state_dict": prefixed(body, "backbone.")})
    with pytest.raises(ValueError, match="the classification head is missing"):
        load_weights(simclr)
    assert_loaded(load_weights(simclr, classes=("a", "b")), net, head=False)


@pytest.mark.parametrize("head", ["fc", "head", "classifier"])
def test_heads(saved, net, head):
    """A head of another name is taken; another number of classes only in training."""
    path = saved(renamed(net.state_dict(), head))
    loaded = load_weights(path)
    assert_loaded(loaded, net)
    assert (f"took {head} as fc" in " ".join(loaded.notes)) == (head != "fc")
    names = tuple(map(str, range(CLASSES)))
    assert_loaded(load_weights(path, classes=names), net)
    torch.manual_seed(5)
    new = load_weights(path, classes=names[:3])
    assert_loaded(new, net, head=False)
    torch.manual_seed(5)
    assert torch.equal(new.model.fc.weight, nn.Linear(64, 3).weight)
    assert new.spec == ModelSpec(NAME, {"in_channels": 3, "num_classes": 3})
    assert "the head has 7 classes; a new head of 3 classes replaces it" in new.notes[-1]


def test_a_head_beside_the_backbone(saved, net):
    weights = net.state_dict()
    path = saved({
        **prefixed(headless(weights), "backbone."),
        "head.weight": weights["fc.weight"], "head.bias": weights["fc.bias"],
    })  # fmt: skip
    assert_loaded(load_weights(path), net)


def test_a_head_after_the_backbone_and_its_own_head_are_two(saved, net):
    """The classifier takes the logits of the backbone: neither alone is the network."""
    path = saved({
        "state_dict": {
            **prefixed(net.state_dict(), "backbone."),
            "classifier.weight": torch.ones(3, CLASSES), "classifier.bias": torch.ones(3),
        }
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"the head has backbone\.fc\.weight, .*classifier\.we"):
        load_weights(path)
    loaded = load_weights(path, classes=("a", "b", "c"))
    assert_loaded(loaded, net, head=False)
    assert "a new head of 3 classes" in loaded.notes[-1]


def test_a_kept_head_of_unknown_classes_is_said(saved, net):
    loaded = load_weights(saved(), classes=list(map(str, range(CLASSES))))
    assert loaded.notes[-1].endswith("kept the head of 7 classes, whose names are unknown")


def test_an_option_of_the_file_is_not_the_callers(tmp_path, net):
    path = tmp_path / "model.pt"
    options = {"num_classes": CLASSES, "in_channels": 3, "impl": "native"}
    checkpoint.write(path, own(net, spec={"name": NAME, "options": options}))
    assert load_weights(path, impl="reference").model.impl == "reference"


def test_own_classes_of_other_names_get_a_new_head(tmp_path, net):
    """Labels count from 0 in both, so the rows of the head would mean other classes."""
    path = tmp_path / "model.pt"
    names = [f"class {i}" for i in range(CLASSES)]
    checkpoint.write(path, own(net, classes=names))
    assert_loaded(load_weights(path, classes=names), net)
    other = load_weights(path, classes=[*names[1:], names[0]])
    assert "of other names; a new head" in other.notes[-1]
    assert other.classes is None


def own(net, **changes):
    return {
        "spec": {"name": NAME, "options": {"num_classes": CLASSES, "in_channels": 3}},
        "data": "bands", "classes": [str(i) for i in range(CLASSES)],
        "preprocessing": {"size": 8, "resize": 8, "mean": [0.5] * 3, "std": [0.5] * 3},
        "recipe": {}, "weights": net.state_dict(), **changes,
    }  # fmt: skip


def test_several_that_fit_are_named(saved, net):
    weights = net.state_dict()
    ema = {key: value + 1 for key, value in weights.items()}
    path = saved({**weights, "ema": ema})
    with pytest.raises(ValueError, match=r"choose one with --key: \. and ema"):
        load_weights(path)
    assert_loaded(load_weights(path, key="."), net)
    path = saved({"model": {**weights, "ema": ema}})
    assert_loaded(load_weights(path, key="model"), net)
    assert_loaded(load_weights(saved({"model": weights, "state_dict": weights})), net)
    path = saved({"model": weights, "model_ema": prefixed(ema, "module.")})
    with pytest.raises(ValueError, match=r"choose one with --key: model and model_ema\.module"):
        load_weights(path)
    assert_loaded(load_weights(path, key="model"), net)
    loaded = load_weights(path, key="model_ema")
    assert torch.equal(loaded.model.conv1.weight, ema["conv1.weight"])
    with pytest.raises(ValueError, match=r"^key: .* has no ResNet at 'optimizer'; it has 'model'"):
        load_weights(path, key="optimizer")
    with pytest.raises(ValueError, match=r"^key: expected names with dots or None, got 3"):
        load_weights(path, key=3)


def test_of_several_the_one_that_fits_is_taken(saved, net):
    other = resnet_fast.create_model("cifar_resnet20").state_dict()
    with pytest.raises(ValueError, match="choose"):
        load_weights(saved({"model": net.state_dict(), "net": net.state_dict()}))
    assert_loaded(load_weights(saved({"model": other, "net": net.state_dict()})), net)


def test_any_place_by_key(saved, net):
    path = saved({"my": {"weights": prefixed(net.state_dict(), "trunk.body.")}})
    with pytest.raises(ValueError, match=r"choose with key \(--key\): my\.weights\.trunk\.body$"):
        load_weights(path)
    assert_loaded(load_weights(path, key="my.weights.trunk.body"), net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_become_fp32(saved, net, dtype):
    weights = {k: v.to(dtype) if v.dim() else v for k, v in net.state_dict().items()}
    loaded = load_weights(saved(weights))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.fc.weight, weights["fc.weight"].float())


def test_safetensors(tmp_path, net):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    safetensors.save_file(net.state_dict(), path)
    assert_loaded(load_weights(path), net)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged, or not"):
        load_weights(path)


BYTES = {
    "html": (b"<!DOCTYPE html><html>login</html>", "a web page; download the file itself"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "gzip": (b"\x1f\x8b\x08" + bytes(9), "a compressed file; unpack it first"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "an HDF5 file, such as Keras writes"),
    "numpy": (b"\x93NUMPY\x01\x00", "a NumPy file"),
    "tar": (bytes(257) + b"ustar" + bytes(250), "a tar archive; unpack it first"),
    "empty": (b"", "damaged, or not a checkpoint: empty"),
    "text": (b"hello", "damaged, or not a checkpoint: "),
    "pickle": (pickle.dumps({"a": 1}), "damaged, or not a checkpoint: "),
}


@pytest.mark.parametrize("kind", BYTES)
def test_files_of_other_kinds_are_named(tmp_path, kind):
    content, says = BYTES[kind]
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        load_weights(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_pickled_models_and_programs_are_named(saved, net, tmp_path):
    path = saved(copy.deepcopy(net))
    says = r"a pickled resnet_fast\.models\.resnet\.ResNet, not its weights; save its state_dict"
    with pytest.raises(CheckpointError, match=says):
        load_weights(path)
    with pytest.raises(ValueError, match=r"state_dict\(\) of the pickled resnet_fast\.models"):
        load_weights(saved({"model": net, "epoch": 3}))
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="a TorchScript program"):
        load_weights(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "any.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(CheckpointError, match="a zip archive that torch"):
        load_weights(tmp_path / "any.zip")


def test_a_pipe_or_folder_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", tmp_path):
        with pytest.raises(CheckpointError, match="expected a regular file, got a folder, pipe"):
            load_weights(path)


def test_unknown_objects_are_read_as_unread(saved):
    """Their attributes are not kept, the items of subclasses of dict are."""
    content = {
        "args": argparse.Namespace(lr=1), "best": np.float64(2.5),
        "config": Box(depth=3), "tensor": torch.ones(2), "window": deque([1, 2], 5),
    }  # fmt: skip
    read = read_any(saved(content))
    assert isinstance(read["args"], Unread)
    assert read["args"].path == "argparse.Namespace"
    assert not vars(read["args"])
    assert read["config"] == {"depth": 3}
    assert read["window"] == [1, 2]
    assert torch.equal(read["tensor"], torch.ones(2))
    assert not {"argparse.Namespace", "test_weights.Box"} & {
        one[1] for one in torch.serialization.get_safe_globals() if isinstance(one, tuple)
    }


class Box(dict):
    """As many configuration packages have one."""


def test_a_dict_within_itself(saved, net):
    content = dict(net.state_dict())
    for name in state_dicts.WRAPPERS:
        content[name] = content
    assert_loaded(load_weights(saved(content)), net)


def test_files_without_checksums_are_read(saved, net):
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this PyTorch always writes them")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = saved()
    finally:
        torch.serialization.set_crc32_options(before)
    assert_loaded(load_weights(path), net)


def test_pickle_protocol_4_is_named(saved):
    path = saved(pickle_protocol=4)
    with pytest.raises(CheckpointError, match="written with pickle protocol 4 or newer"):
        load_weights(path)


def test_no_memory_beyond_the_file(saved, net, tmp_path):
    weights = net.state_dict()
    wide = {**weights, "fc.weight": torch.zeros(1, 1).expand(10**9, 64),
            "fc.bias": torch.zeros(1).expand(10**9)}  # fmt: skip
    with pytest.raises(CheckpointError, match="its tensors overlap"):
        load_weights(saved(wide))
    path = saved()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(
        tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED
    ) as bomb:
        for info in source.infolist():
            bomb.writestr(info.filename, source.read(info))
        bomb.writestr("archive/data/999", bytes(64 << 20))
    with pytest.raises(CheckpointError, match="its members are larger than the file"):
        load_weights(tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match=r"contains builtins\.bytearray"):
        load_weights(saved({"x": bytearray(3)}))


class Asks:
    """A call in a pickle."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


NESTED = ()
for _ in range(64):
    NESTED = (NESTED, NESTED)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (Asks(torch.FloatTensor, 10**11), r"it calls torch\.FloatTensor"),
        (Asks(torch.Tensor, 10**6, 10**6), r"it calls torch\.Tensor"),
        (Asks(torch.UntypedStorage, 10**12), r"it calls torch\.storage\.UntypedStorage"),
        (Asks(bytearray, 10**12), r"it contains builtins\.bytearray"),
        (NESTED, "it has a tuple of [0-9]+ parts"),
        (Asks(set, [NESTED]), "it has a tuple of [0-9]+ parts"),
    ],
    ids=["tensor", "tensor of sides", "storage", "bytearray", "tuple", "set"],
)
def test_a_pickle_cannot_ask_for_memory_or_time(saved, content, says, old):
    """A tuple of tuples that share their parts takes 2^64 steps to hash or to print."""
    path = saved({"x": content}, _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match=says):
        load_weights(path)


def test_large_flat_tuples_and_empty_tensors_are_read(saved):
    content = {"milestones": tuple(range(20_000)), "empty": torch.empty(0), "name": ("a", ("b",))}
    assert read_any(saved(content))["milestones"] == content["milestones"]


def test_lengths_beyond_the_file_are_damage(tmp_path, saved):
    path = saved(_use_new_zipfile_serialization=False)
    start = path.read_bytes()[:14]  # the magic number
    for torn in (b"\x80\x02X\xff\xff\xff\xffabc.", b"\x80\x04\x8e" + b"\xff" * 8 + b"abc."):
        path.write_bytes(start + torn)
        with pytest.raises(CheckpointError, match=r"damaged, or not a checkpoint: (?!Mem)"):
            read_any(path)


def test_names_of_any_kind_are_named_briefly(tmp_path, net):
    path = tmp_path / "model.pt"
    long = "x" * 10**5
    for changes in (
        {"weights": {**net.state_dict(), b"key": torch.ones(2)}},
        {"weights": {**net.state_dict(), "a\nb": torch.ones(2)}},
        {"weights": {**net.state_dict(), long: torch.ones(2)}},
        {"weights": {**net.state_dict(), long: 5}},
        {"weights": {**net.state_dict(), "fc.bias": torch.nested.nested_tensor([torch.ones(2)])}},
        {"spec": {"name": long, "options": {}}},
        {"spec": {"name": torch.ones(3, 3), "options": {}}},
        {"spec": {"name": NAME, "options": {"stem": long}}},
        {"spec": {"name": NAME, "options": {long: 1}}},
    ):
        checkpoint.write(path, own(net, **changes))
        with pytest.raises(ValueError) as raised:
            load_weights(path)
        message = str(raised.value)
        assert str(path) in message
        assert len(message) < 1000 + len(str(path))
        assert "\n" not in message


def changed(name, value):
    return lambda weights: {**weights, name: value}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed("fc.weight", torch.tensor(1.0)), r"fc\.weight has shape \[\]"),
        (changed("fc.bias", torch.ones(3)), r"fc\.bias has shape \[3\]"),
        (changed("conv1.weight", torch.ones(9)), r"conv1\.weight: expected \[planes, 3, height"),
        (changed("conv1.weight", torch.ones(16, 1, 3, 3)), r"conv1\.weight: expected \[planes, 3"),
        (changed("conv1.weight", torch.ones(16, 3, 3, 3, device="meta")), "expected a dense tens"),
        (changed("fc.bias", torch.ones(7).to_sparse()), "expected a dense tensor with values"),
        (changed("bn_last.bias", torch.ones(64).long()), "expected floating-point values, got"),
        (changed("layer2.0.conv1.weight", torch.ones(2, 2)), "are those of no model"),
        (changed("layer9.0.conv1.weight", torch.ones(2, 2)), "are those of no model"),
        (lambda w: {k: v for k, v in w.items() if k != "bn_last.bias"}, "are those of no model"),
        (lambda w: {"format": checkpoint.FORMAT}, "classes: expected a list of names, got None"),
    ],
    ids=["0-d head", "bias", "1-d conv", "grey", "meta", "sparse", "int", "shape", "more", "less",
         "format"],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(saved, net, change, says):
    path = saved(change(net.state_dict()))
    with pytest.raises(ValueError, match=says) as raised:
        load_weights(path)
    assert str(path) in str(raised.value)


def test_a_named_model_that_does_not_fit(saved, net):
    path = saved()
    for name, says in {
        "cifar_resnet20": r"layer1\.0\.bn1\.weight is missing",
        "resnet18": r"conv1\.weight: expected \[64, 3, 7, 7\], got \[16, 3, 3, 3\]",
    }.items():
        with pytest.raises(ValueError, match=f"do not fit {name}: {says}"):
            load_weights(path, name)


WRONG = {
    "classes text": ({"classes": "abc"}, "classes: expected a list of names, got 'abc'"),
    "classes few": ({"classes": ["a"]}, "classes: expected 7 names, one per row of fc.weight"),
    "classes none": ({"classes": []}, "classes: expected 1 to 1000000, got 0"),
    "classes bytes": ({"classes": [b"a"] * 7}, "classes: expected a list of names"),
    "no preprocessing": ({"preprocessing": None}, "preprocessing: expected a dict of size, resize"),
    "no spec": ({"spec": 5}, "spec: expected a name and options, got 5"),
    "spec name": ({"spec": {"name": "vgg", "options": {}}}, "spec: name: expected one of"),
    "spec option": ({"spec": {"name": NAME, "options": {"layers": 10**9}}}, "spec: "),
    "spec tensor": ({"spec": {"name": NAME, "options": {"planes": torch.ones(2)}}},
                    "spec: planes: expected plain values"),
    "spec huge": ({"spec": {"name": NAME, "options": {"planes": 10**30}}}, "spec: "),
    "weights": ({"weights": [1]}, "weights: expected a dict, got [1]"),
    "weight": ({"weights": {"conv1.weight": 5}}, "conv1.weight: expected a tensor, got 5"),
    **{
        f"preprocessing {name} {value}": (
            {"preprocessing": {"size": 8, "resize": 8, "mean": [0.5] * 3, "std": [0.5] * 3,
                               name: value}}, f"preprocessing: {says}",
        ) for name, value, says in [
            ("size", 10**7, "size: expected at most 2048"),
            ("size", 8.5, "size: expected at least 1 pixel"),
            ("size", 0, "size: expected at least 1 pixel"),
            ("resize", 10**30, "resize: expected at most"),
            ("resize", 7, "resize: expected at least the size, 8 pixels"),
            ("mean", "abc", "mean: expected one number per channel"),
            ("mean", [], "mean: expected one number per channel"),
            ("mean", [0.5], "std: expected 1 numbers above 0"),
            ("std", [0.0] * 3, "std: expected 3 numbers above 0"),
            ("std", [float("nan")] * 3, "std: expected one number per channel"),
            ("other", 1, "expected a dict of size, resize, mean, std"),
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_own_files_of_wrong_content_are_named(tmp_path, net, kind):
    changes, says = WRONG[kind]
    path = tmp_path / "model.pt"
    checkpoint.write(path, own(net, **changes))
    with pytest.raises(ValueError) as raised:
        load_weights(path)
    assert says in str(raised.value)
    assert str(path) in str(raised.value)


def test_values_without_end(tmp_path, net):
    """Lists that contain a list twice, which contains one twice, and so on: 2^64 values."""
    values = [1]
    for _ in range(64):
        values = [values, values]
    path = tmp_path / "model.pt"
    for name in ("classes", "spec", "preprocessing", "weights"):
        checkpoint.write(path, own(net, **{name: values}))
        with pytest.raises(ValueError, match="expected"):
            load_weights(path)


def test_key_finds_prefixes_in_dicts():
    content = {"a": {"b.conv1.weight": 1, "b.c.conv1.weight": 2, "b.c.bn1.bias": 3}}
    found = state_dicts.find(content, "a.b.c")
    assert [(one.key, dict(one.body)) for one in found] == [
        ("a.b.c", {"conv1.weight": 2, "bn1.bias": 3})
    ]
    assert state_dicts.find(content, "a.x") == []
    assert state_dicts.find({"model": {"conv1.weight": 1}}, "model")[0].key == "model"


def test_names_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("cat\r\n dog \n\nKöln\n".encode("utf-8-sig"))
    assert read_names(path) == ("cat", "dog", "Köln")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a readable text file of class names"):
        read_names(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="expected a regular file"):
        read_names(tmp_path / "pipe")


def test_damage_is_found_by_the_checksum(saved):
    path = saved()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="wrong checksum of"):
        read_any(path)


def test_old_files_are_damaged_by_name(saved):
    path = saved(_use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for size in (1, 30, 2000, len(content) - 10):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="damaged, or not a checkpoint"):
            read_any(path)


def test_forbidden_names_are_refused(tmp_path):
    """What no file of weights needs: torch.load refuses os by itself, others are not called."""
    for function in (os.mkdir, eval, exec):
        path = tmp_path / "a.pth"
        marker = tmp_path / "marker"

        class Harm:
            def __reduce__(self, function=function, marker=marker):
                text = str(marker) if function is os.mkdir else f"open({str(marker)!r}, 'w')"
                return function, (text,)

        torch.save({"x": Harm()}, path)
        with pytest.raises(ValueError, match=r"a\.pth"):
            load_weights(path)
        assert not marker.exists()
