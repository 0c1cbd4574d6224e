"""Data sets, from files in their official form, and augmentation."""

import io
import pickle
import shutil
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_cases import RECIPE, model
from training_cases import data as bands

from resnet_fast.runtime.optional import MissingPackage
from resnet_fast.training import augment as augmentation
from resnet_fast.training import fit, load_data
from resnet_fast.training.augment import AUGMENTATIONS, Draws, augment
from resnet_fast.training.cifar import FOLDER, META, TEST, TRAIN
from resnet_fast.training.imagefolder import ImageFolder
from resnet_fast.training.images import read_image
from resnet_fast.training.preprocessing import Preprocessing, imagenet

NAMES = [b"airplane", b"automobile", b"bird", b"cat", b"deer",
         b"dog", b"frog", b"horse", b"ship", b"truck"]  # fmt: skip
IMAGES = 7


def cifar_files():
    """Name → the bytes of a batch as CIFAR-10 has them, with a few images each."""
    rng = np.random.default_rng(0)
    files = {}
    for name in (*TRAIN, TEST):
        batch = {
            b"batch_label": name.encode(), b"labels": rng.integers(10, size=IMAGES).tolist(),
            b"data": rng.integers(256, size=(IMAGES, 3072), dtype=np.uint8),
            b"filenames": [b"image.png"] * IMAGES,
        }  # fmt: skip
        files[name] = batch
    files[META] = {b"num_cases_per_batch": IMAGES, b"label_names": NAMES, b"num_vis": 3072}
    return files


def as_of_2009(content):
    """A pickle that names NumPy's functions where they were then."""
    return pickle.dumps(content, protocol=2).replace(b"numpy._core", b"numpy.core")


def write_cifar(path, files):
    """`files` as the archive's folder or, where `path` ends so, as its .tar.gz."""
    pickled = {
        name: content if isinstance(content, bytes) else as_of_2009(content)
        for name, content in files.items()
    }
    if path.suffix != ".gz":
        path.mkdir(parents=True)
        for name, content in pickled.items():
            (path / name).write_bytes(content)
        return path
    with tarfile.open(path, "w:gz") as archive:
        for name, content in pickled.items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", FOLDER, f"data/{FOLDER}"])
def test_cifar_from_archive_and_folder(tmp_path, name):
    files = cifar_files()
    write_cifar(tmp_path / name, files)
    data = load_data("cifar10", tmp_path / name.split("/")[0])
    assert data.classes == tuple(n.decode() for n in NAMES)
    assert (data.num_classes, data.channels, data.size) == (10, 3, 32)
    assert (data.count("train"), data.count("test")) == (5 * IMAGES, IMAGES)
    assert data.train_x.dtype == torch.uint8
    second = files[TRAIN[1]]
    assert data.train_y[IMAGES : 2 * IMAGES].tolist() == second[b"labels"]
    red_first = second[b"data"][3].reshape(3, 32, 32)
    assert np.array_equal(data.train_x[IMAGES + 3].numpy(), red_first)
    assert np.array_equal(data.test_x[0].numpy(), files[TEST][b"data"][0].reshape(3, 32, 32))
    values = data.train_x.double() / 255
    assert data.preprocessing.mean == pytest.approx(values.mean((0, 2, 3)).tolist(), rel=1e-6)
    std = values.std((0, 2, 3), correction=0)
    assert data.preprocessing.std == pytest.approx(std.tolist(), rel=1e-6)
    assert data.augmentation == "crop-flip"


def without(name):
    files = cifar_files()
    del files[name]
    return files


def changed(name, **values):
    files = cifar_files()
    files[name] = {**files[name], **{key.encode(): value for key, value in values.items()}}
    return files


class Harm:
    """What an archive of an enemy may hold."""

    def __reduce__(self):
        return print, ("harm",)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (without(TRAIN[2]), "data_batch_3"),
        (without(META), "batches.meta"),
        (changed(TEST, data=np.zeros((IMAGES, 3000), np.uint8)), "test_batch: expected 3072"),
        (changed(TEST, labels=[1]), "test_batch: expected 3072 bytes and one label per image"),
        (changed(TRAIN[0], labels=[10] * IMAGES), "data_batch_1: expected labels from 0 to 9"),
        (changed(META, label_names=[]), "batches.meta has no label_names"),
        ({**cifar_files(), TEST: b"\x80\x02}"}, "test_batch: not a CIFAR-10 batch"),
        ({**cifar_files(), TEST: pickle.dumps([])}, "test_batch: not a CIFAR-10 batch"),
        ({**cifar_files(), TEST: {b"data": Harm()}}, "contains (builtins|__builtin__).print"),
    ],
    ids=["no batch", "no meta", "width", "labels", "range", "names", "torn", "list", "harm"],
)
@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", FOLDER])
def test_a_broken_cifar_is_named(tmp_path, capsys, name, files, says):
    path = write_cifar(tmp_path / name, files)
    with pytest.raises(ValueError, match=says) as raised:
        load_data("cifar10", path)
    assert str(raised.value).startswith(str(path))
    assert capsys.readouterr().out == ""


def test_a_truncated_archive_is_named(tmp_path):
    path = write_cifar(tmp_path / "cifar.tar.gz", cifar_files())
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=f"{path}: damaged, or not a tar archive"):
        load_data("cifar10", path)
    path.write_text("no archive")
    with pytest.raises(ValueError, match=f"{path}: damaged, or not a tar archive"):
        load_data("cifar10", path)


def picture(path, size=(40, 30), color=(200, 30, 90)):
    """A PNG of noise around `color`, w × h."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(len(str(path)))
    values = rng.integers(-20, 21, size=(size[1], size[0], 3)) + np.array(color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes under train and val; some portraits, some landscapes."""
    for name, color in (("cat", (220, 40, 40)), ("dog", (40, 40, 220))):
        for i in range(12):
            size = (40, 30) if i % 2 else (24, 33)
            picture(tmp_path / "train" / name / f"{i}.png", size, color)
        for i in range(3):
            picture(tmp_path / "val" / name / "more" / f"{i}.PNG", color=color)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_images(folder, workers):
    data = load_data("imagefolder", folder, size=16)
    assert data.classes == ("cat", "dog")
    assert (data.count("train"), data.count("test")) == (24, 6)
    assert (data.num_classes, data.channels, data.size) == (2, 3, 16)
    chosen = [torch.tensor([0, 23]), torch.tensor([5])]
    train = list(data.batches("train", chosen, torch.device("cpu"), workers))
    assert [x.shape for x, _ in train] == [(2, 3, 18, 18), (1, 3, 18, 18)]
    assert [y.tolist() for _, y in train] == [[0, 1], [0]]
    ((x, y),) = data.batches("test", [torch.tensor([5])], torch.device("cpu"), workers)
    wanted = read_image(folder / "val" / "dog" / "more" / "2.PNG", data.preprocessing)
    assert torch.equal(x[0], wanted)
    assert y.item() == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_draws_no_random_numbers(folder, workers):
    """A run that goes on within an epoch begins to read once more than one that is whole."""
    data = load_data("imagefolder", folder, size=16)
    before = torch.get_rng_state()
    list(data.batches("train", [torch.arange(3)], torch.device("cpu"), workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_without_a_test(folder):
    """Every fifth of a class is for the test, the same in every run."""
    data = ImageFolder(folder / "train", 16)
    assert (data.count("train"), data.count("test")) == (20, 4)
    assert [label for _, label in data.files["test"]] == [0, 0, 1, 1]
    assert not set(data.files["train"]) & set(data.files["test"])
    assert ImageFolder(folder / "train", 16).files == data.files
    assert ImageFolder(folder / "train", 16, seed=1).files != data.files
    shutil.rmtree(folder / "val")
    assert ImageFolder(folder, 16).files == data.files


@pytest.mark.slow
def test_a_net_learns_from_a_folder(folder):
    data = load_data("imagefolder", folder, size=16)
    net = model()
    net.fc = torch.nn.Linear(16, 2)
    recipe = replace(RECIPE, batch_size=12, epochs=12, augment="auto")
    history = fit(net, data, recipe, workers=1)
    assert history.epochs[-1]["test_accuracy"] == 1.0


def test_reading_is_torchvisions(tmp_path):
    """Shorter side to `resize`, the middle cut out, as written for Pillow by hand."""
    image = pytest.importorskip("PIL.Image")
    path = picture(tmp_path / "a.png", (45, 31))
    preprocessing = imagenet(14)
    assert (preprocessing.size, preprocessing.resize) == (14, 16)
    with image.open(path) as opened:
        resized = opened.resize((int(16 * 45 / 31), 16), image.Resampling.BILINEAR)
    top, left = round((16 - 14) / 2), round((int(16 * 45 / 31) - 14) / 2)
    wanted = np.asarray(resized)[top : top + 14, left : left + 14].transpose(2, 0, 1)
    assert np.array_equal(read_image(path, preprocessing).numpy(), wanted)
    x = torch.from_numpy(wanted.copy())[None]
    normal = preprocessing.normalize(x)
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        by_hand = (x[:, channel] / 255.0 - mean) / std
        torch.testing.assert_close(normal[:, channel], by_hand)
    assert (imagenet().size, imagenet().resize) == (224, 256)
    assert imagenet().at(112).resize == 128


def test_grey_images_are_read_as_asked(tmp_path):
    image = pytest.importorskip("PIL.Image")
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image.fromarray(values).save(tmp_path / "grey.png")
    one = read_image(tmp_path / "grey.png", Preprocessing(8, 8, (0.5,), (0.5,)))
    assert np.array_equal(one.numpy(), values[None])
    three = read_image(tmp_path / "grey.png", Preprocessing(8, 8, (0.5,) * 3, (0.5,) * 3))
    assert torch.equal(three, one.expand(3, -1, -1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_once(folder, workers):
    """The message is the file and the reason, from another process too."""
    broken = folder / "train" / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    data = load_data("imagefolder", folder, size=16)
    order = [torch.arange(12)]
    with pytest.raises(ValueError, match="not a readable image") as raised:
        list(data.batches("train", order, torch.device("cpu"), workers))
    assert str(raised.value).startswith(f"{broken}: not a readable image")
    assert "Traceback" not in str(raised.value)


def test_what_is_missing_from_a_folder_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_data("imagefolder", tmp_path / "nowhere")
    (folder / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images"):
        load_data("imagefolder", folder)
    (folder / "train" / "empty").rmdir()
    for path in (folder / "val" / "dog" / "more").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="dog: no images"):
        load_data("imagefolder", folder)
    (folder / "val" / "dog" / "more").rmdir()
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    picture(folder / "val" / "wolf" / "a.png")
    with pytest.raises(ValueError, match="val: its classes differ from those of train: 'dog'"):
        load_data("imagefolder", folder)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"bare: expected one folder per class, .* found none"):
        load_data("imagefolder", tmp_path / "bare")
    picture(tmp_path / "bare" / "val" / "a.png")
    with pytest.raises(ValueError, match=r"bare/val: expected one folder per class, .* none"):
        load_data("imagefolder", tmp_path / "bare")
    picture(tmp_path / "bare" / "train" / "b.png")
    with pytest.raises(ValueError, match="train: expected one folder per class"):
        load_data("imagefolder", tmp_path / "bare")
    for name in ("cat", "dog"):
        picture(tmp_path / "few" / "train" / name / "a.png")
    few = load_data("imagefolder", tmp_path / "few")
    with pytest.raises(ValueError, match="data: expected images to train on and to test on, got 2"):
        fit(model(), few, RECIPE)


@pytest.mark.parametrize("size", [16, 32])
def test_the_digits(size):
    pytest.importorskip("sklearn")
    data = load_data("digits", size=size)
    assert data.count("train") + data.count("test") == 1797
    assert data.train_x.shape[1:] == (3, size, size)
    assert torch.equal(data.train_x[:, 0], data.train_x[:, 2])
    normal = data.preprocessing.normalize(data.train_x)
    assert normal.mean().abs() < 1e-5
    assert normal.std() == pytest.approx(1, abs=1e-4)
    assert torch.bincount(data.test_y, minlength=10).min() >= 34
    assert torch.equal(load_data("digits", size=size).test_x, data.test_x)


def test_synthetic_images_can_be_told_apart():
    data = load_data("synthetic", size=16)
    assert torch.bincount(data.train_y).tolist() == [200] * 10
    means = torch.stack([data.train_x[data.train_y == i].mean(0) for i in range(10)])
    apart = (data.test_x[:, None] - means).square().mean((2, 3, 4)).argmin(1)
    assert (apart == data.test_y).double().mean() > 0.95
    assert torch.equal(load_data("synthetic", size=16).train_x, data.train_x)
    assert not torch.equal(load_data("synthetic", size=16, seed=1).train_x, data.train_x)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "mnist"}, "name: expected one of digits, cifar10"),
        ({"name": "cifar10"}, "path: cifar10 needs the path"),
        ({"name": "imagefolder"}, "path: imagefolder needs the path"),
        ({"name": "digits", "path": "x"}, "path: expected None for digits, got 'x'"),
        ({"name": ["digits"]}, "name: expected one of digits"),
        ({"name": "cifar10", "path": 5}, "path: expected a path, got 5"),
        ({"name": "synthetic", "size": 32.0}, "size: expected at least 8 pixels, got 32.0"),
        ({"name": "synthetic", "seed": None}, "seed: expected an integer, got None"),
        ({"name": "synthetic", "preprocessing": 8}, "preprocessing: expected a Preprocessing"),
        ({"name": "digits", "size": 4}, "size: expected at least 8 pixels"),
        ({"name": "cifar10", "path": "x", "size": 16}, "size: expected 32 pixels for cifar10"),
        ({"name": "cifar10", "path": "/nowhere/cifar"}, "/nowhere/cifar: no such file or folder"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        load_data(**arguments)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"train_y": torch.full((100,), 4)}, "train_y: expected labels 0 to 3"),
        ({"test_y": -torch.ones(31, dtype=torch.int64)}, "test_y: expected labels 0 to 3"),
        ({"test_y": torch.zeros(30, dtype=torch.int64)}, "test_y: expected 31 labels in int64"),
        ({"train_y": torch.zeros(100)}, r"train_y: expected .* got \(100,\) in float32"),
        ({"train_x": torch.zeros(100, 8, 8)}, r"train_x: expected \[N, C, H, W\]"),
        ({"test_x": np.zeros((31, 3, 8, 8))}, "test_x: expected a torch.Tensor, got a ndarray"),
        ({"classes": 4}, "classes: expected a tuple of names, got 4"),
        ({"augmentation": "mixup"}, "augmentation: expected one of none, crop"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_images_and_labels_that_do_not_fit_are_named(wrong, says):
    with pytest.raises(ValueError, match="^" + says):
        replace(bands(), **wrong)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingPackage, match=r"digits need scikit-learn \(pip install scikit"):
        load_data("digits")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingPackage, match=r"images need pillow \(pip install pillow\)"):
        read_image(tmp_path / "a.png", imagenet())


def draws(total, seed=0, share=slice(None)):
    return Draws(torch.Generator().manual_seed(seed), total, share)


def images(n=6, size=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def test_a_crop_is_a_window_of_the_padded_image():
    x = images(200)
    y = augment("crop", x, 8, draws(200))
    assert y.dtype == torch.uint8
    windows = F.pad(x, (1,) * 4).unfold(2, 8, 1).unfold(3, 8, 1)  # [N,3,3,3,8,8]
    hits = (windows == y[:, :, None, None]).all((1, 4, 5))  # [N,3,3]
    assert (hits.sum((1, 2)) == 1).all()
    assert hits.any(0).all()  # every window comes


def test_flips_are_half_of_the_images():
    x = images(400)
    y = augment("crop-flip", x, 8, draws(400))
    same = augmentation.pad_crop(x, 8, 1, draws(400))
    mirrored = (y == same.flip(3)).flatten(1).all(1)
    assert ((y == same).flatten(1).all(1) ^ mirrored).all()
    assert 160 < mirrored.sum() < 240


def test_a_crop_of_everything_is_the_image(monkeypatch):
    monkeypatch.setattr(augmentation, "AREA", (1.0, 1.0))
    monkeypatch.setattr(augmentation, "RATIO", (1.0, 1.0))
    x = images(3, 8)
    y = augmentation.resized_crop(x, 8, draws(3))
    torch.testing.assert_close(y, x.float() / 255, rtol=1e-5, atol=1e-5)
    half = augmentation.resized_crop(x, 4, draws(3))
    torch.testing.assert_close(half, F.avg_pool2d(x.float() / 255, 2), rtol=1e-5, atol=1e-5)


def test_boxes_have_the_area_and_lie_within():
    """On a ramp, values tell where a box is, and their spread how wide."""
    ramp = torch.arange(64.0).expand(500, 1, 64, 64) / 63
    x = torch.cat([ramp, ramp.transpose(2, 3)], 1)
    y = augmentation.resized_crop(x, 32, draws(500))
    assert y.shape == (500, 2, 32, 32)
    assert y.min() >= 0
    assert y.max() <= 1
    spread = (y.amax((2, 3)) - y.amin((2, 3))) * 63 / 64 * 32 / 31
    area = spread.prod(1)
    assert 0.06 < area.min() < 0.15
    assert 0.85 < area.max() <= 1.05
    centre = y.mean((2, 3))
    assert (centre.std(0) > 0.05).all()
    assert centre.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.03)


def test_none_takes_the_middle():
    x = images(2, 12)
    assert torch.equal(augment("none", x, 8, draws(2)), x[:, :, 2:10, 2:10])
    assert torch.equal(augment("none", x, 12, draws(2)), x)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_shares_of_a_batch_are_the_batch(name):
    """However many processes there are, an image becomes the same."""
    x = images(12)
    whole = augment(name, x, 8, draws(12))
    for size in (2, 3):
        parts = []
        for rank in range(size):
            share = slice(rank, None, size)
            parts.append(augment(name, x[share], 8, draws(12, share=share)))
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)
    assert name == "none" or not torch.equal(augment(name, x, 8, draws(12, seed=1)), whole)
