"""Augmentation by torchvision: the same pixels as its own transforms, and seeds of each image."""

import gc
import os
import pickle
import subprocess
import sys
import textwrap
import time
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import torch
import torchvision_ops
from training_cases import data as bands

from resnet_fast.runtime.optional import MissingPackage
from resnet_fast.training.imagefolder import ImageFolder
from resnet_fast.training.images import read_augmented
from resnet_fast.training.preprocessing import Preprocessing, imagenet
from resnet_fast.training.transforms import Transform, augmented, mixed, seed_of, seeded

Image = pytest.importorskip("PIL.Image")
WHY_NOT = torchvision_ops.why_not("torchvision.transforms.v2")
needs_torchvision = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
CPU = torch.device("cpu")
CROPS = Transform("resized-crop-flip")
ALL = Transform("resized-crop-flip", 9, 0.5)
MEAN = (0.485, 0.456, 0.406)


def picture(path, size=(90, 70), seed=0, **options):
    """An image of smooth noise, w × h."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    image.save(path, **options)
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder for training and tests, of two classes and different sizes."""
    for part, images in (("train", 6), ("val", 2)):
        for label in ("cat", "dog"):
            for i in range(images):
                picture(tmp_path / part / label / f"{i}.png", (60 + 9 * i, 70), i)
    return tmp_path


def reference(image, transform, size, seed):
    """By torchvision's transforms alone, in the order of its reference presets."""
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    if transform.randaugment is not None:
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(v2.RandAugment(2, transform.randaugment, interpolation=bilinear))
    steps.append(v2.PILToTensor())
    if transform.random_erasing:
        value = [round(255 * m) for m in MEAN]
        steps.append(v2.RandomErasing(transform.random_erasing, value=value))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return v2.Compose(steps)(image)


@needs_torchvision
@pytest.mark.parametrize("transform", [CROPS, ALL], ids=["crop-flip", "all"])
@pytest.mark.parametrize("size", [(90, 70), (31, 80), (400, 3), (1, 1)], ids=str)
def test_pixels_are_torchvisions(tmp_path, transform, size):
    """Bit by bit, narrow images and palettes included, where a JPEG is not decoded smaller."""
    path = picture(tmp_path / "a.png", size)
    with Image.open(path) as opened:
        opened.quantize(64).save(tmp_path / "palette.png")
    picture(tmp_path / "a.jpg", size)
    for name in ("a.png", "a.jpg", "palette.png"):
        with Image.open(tmp_path / name) as opened:
            image = opened.convert("RGB")
        for seed in range(20):
            x = read_augmented(tmp_path / name, imagenet(32), transform, seed)
            assert x.dtype == torch.uint8
            assert torch.equal(x, reference(image, transform, 32, seed))


@needs_torchvision
def test_grey_and_sixteen_bits(tmp_path):
    """One channel where the model has one; values of 16 bits as `read_image` scales them."""
    ramp = (np.arange(4096).reshape(64, 64) * 16).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "16.png")
    one = Preprocessing(16, 16, (0.5,), (0.5,))
    bytes_of = Image.fromarray((ramp / 257).round().astype(np.uint8))
    for seed in range(5):
        x = read_augmented(tmp_path / "16.png", one, ALL, seed)
        assert x.shape == (1, 16, 16)
        crops = read_augmented(tmp_path / "16.png", imagenet(16), CROPS, seed)
        wanted = reference(bytes_of.convert("RGB"), CROPS, 16, seed)
        assert (crops.int() - wanted.int()).abs().max() <= 1  # rounded after resizing, not before


@needs_torchvision
def test_large_jpegs_are_decoded_smaller(tmp_path, monkeypatch):
    """The smaller the larger the crop, to no less than twice the size; the pixels stay close."""
    path = picture(tmp_path / "a.jpg", (1600, 1200), quality=95)
    decoded, crop = [], Image.Image.crop

    def cropped(image, box=None):
        decoded.append((image.width, box))
        return crop(image, box)

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    wanted = {seed: reference(image, CROPS, 56, seed).int() for seed in range(30)}
    monkeypatch.setattr(Image.Image, "crop", cropped)
    for seed, one in wanted.items():
        x = read_augmented(path, imagenet(56), CROPS, seed).int()
        assert (x - one).abs().float().mean() < 3
        width, (left, top, right, bottom) = decoded.pop()
        assert min(right - left, bottom - top) >= 2 * 56 - 1 or width == 1600
        decoded.append(width)
    assert Counter(decoded).keys() == {200, 400, 800}


@needs_torchvision
def test_crops_come_from_the_whole_image(tmp_path):
    """A landscape's left and right ends too, which its centre square lacks."""
    ramp = np.broadcast_to(np.linspace(0, 255, 300), (50, 300)).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    x = torch.stack([
        read_augmented(tmp_path / "a.png", imagenet(16), CROPS, seed) for seed in range(400)
    ]).float()  # fmt: skip
    lowest, highest = x.amin((1, 2, 3)), x.amax((1, 2, 3))
    assert lowest.min() < 10 and highest.max() > 245
    assert 0.1 < (highest < 255 * 5 / 12).float().mean() < 0.5  # left of the centre square
    mirrored = (x[:, 0, 0, 0] > x[:, 0, 0, -1]).float().mean()
    assert 0.4 < mirrored < 0.6


@needs_torchvision
def test_seeds_alone_decide(photos):
    """Not workers, order or batches; another epoch and another seed differ."""
    order = [torch.tensor([3, 0, 7]), torch.tensor([11, 5])]

    def read(order=order, workers=0, seed=1, epoch=2):
        data = ImageFolder(photos, 24)
        found = list(
            data.batches("train", order, CPU, workers, transform=ALL, seed=seed, epoch=epoch)
        )
        data.close()
        return torch.cat([x for x, _ in found])

    x = read()
    assert x.shape == (5, 3, 24, 24) and x.dtype == torch.uint8
    for workers in (1, 2):
        assert torch.equal(read(workers=workers), x)
    torch.manual_seed(5)
    again = read([torch.tensor([5]), torch.tensor([11, 7, 0, 3])])
    assert torch.equal(again[[4, 3, 2, 1, 0]], x)
    for other in (read(seed=2), read(epoch=3)):
        assert (other != x).flatten(1).any(1).all()


def test_seeds_are_well_mixed():
    seeds = {seed_of(a, b, c) for a in range(20) for b in range(20) for c in range(50)}
    assert len(seeds) == 20_000
    assert seed_of(1, 23, 4) != seed_of(12, 3, 4)
    assert seed_of(0, 0, 0) == seed_of(0, 0, 0) != seed_of(-1, 0, 0)
    ones = np.mean([bin(seed).count("1") for seed in seeds])
    assert ones == pytest.approx(32, abs=0.2)


def test_the_generator_is_restored():
    before = torch.get_rng_state()
    with seeded(seed_of(0)):
        first = torch.rand(3)
    with pytest.raises(ZeroDivisionError), seeded(seed_of(0)):
        assert torch.equal(torch.rand(3), first)
        raise ZeroDivisionError
    with torch.device("meta"), seeded(seed_of(0)):  # another default device
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)


@needs_torchvision
def test_unreadable_images_are_left_out_or_an_error(photos):
    bad = photos / "train" / "cat" / "2.png"
    bad.write_bytes(bad.read_bytes()[:100])
    chosen = [torch.arange(12)]
    for workers in (0, 1):
        data = ImageFolder(photos, 16, on_bad_image="skip")
        ((x, y),) = data.batches("train", chosen, CPU, workers, transform=ALL)
        assert (len(x), y.tolist()) == (11, [0] * 5 + [1] * 6)
        assert list(data.unreadable) == [str(bad)]
        data = ImageFolder(photos, 16)
        with pytest.raises(ValueError, match=r"2\.png: not a readable image"):
            list(data.batches("train", chosen, CPU, workers, transform=ALL))
        data.close()


def test_other_augmentations_are_read_for_the_device(photos):
    data = ImageFolder(photos, 14)
    order = [torch.arange(4)]
    ((x, _),) = data.batches("train", order, CPU)
    assert x.shape[2:] == (16, 16)
    for augment in ("none", "crop", "crop-flip"):
        transform = Transform(augment, 9, 0.5)
        assert not transform.of_files
        ((same, _),) = data.batches("train", order, CPU, transform=transform, seed=1, epoch=1)
        assert torch.equal(same, x)
    ((x, y),) = bands().batches("train", order, CPU, 2, transform=ALL, seed=1, epoch=1)
    assert torch.equal(x, bands().train_x[:4]) and torch.equal(y, bands().train_y[:4])


def pids_of(data):
    """Process IDs of the workers that wait."""
    return [worker.pid for worker in data._loader._waiting._iterator._workers]


def assert_ended(pids):
    """The processes exist no more, or soon do not."""
    limit = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < limit:
        time.sleep(0.05)
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="no /proc")
def test_workers_stay_until_close(photos):
    data = ImageFolder(photos, 16)
    order = list(torch.arange(12).split(3))
    list(data.batches("train", order, CPU, 2))
    pids = pids_of(data)
    assert len(set(pids)) == 2 and os.getpid() not in pids
    list(data.batches("test", [torch.arange(4)], CPU, 2))  # another split, size and order
    list(data.batches("train", order[::-1], CPU, 2, epoch=1))
    assert pids_of(data) == pids
    assert data.seen_by(imagenet(8))._loader._waiting is None
    assert pickle.loads(pickle.dumps(data))._loader._waiting is None
    list(data.batches("train", order, CPU, 1))  # another number of workers
    assert len(pids_of(data)) == 1
    assert_ended(pids)
    pids = pids_of(data)
    data.close()
    data.close()
    assert_ended(pids)
    list(data.batches("train", order, CPU, 1))
    pids = pids_of(data)
    del data
    gc.collect()
    assert_ended(pids)


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="no /proc")
def test_workers_end_with_a_call_that_is_left(photos):
    data = ImageFolder(photos, 16)
    order = list(torch.arange(12).split(2))
    list(data.batches("train", order, CPU, 1))
    pids = pids_of(data)
    with closing(data.batches("train", order, CPU, 1)) as left:
        next(left)
    assert_ended(pids)
    list(data.batches("train", order, CPU, 1))
    pids = pids_of(data)
    (photos / "train" / "dog" / "5.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="not a readable image"):
        list(data.batches("train", order, CPU, 1))
    assert_ended(pids)
    assert [len(x) for x, _ in data.batches("test", [torch.arange(3)], CPU, 1)] == [3]
    data.close()


def test_a_call_within_another(photos):
    """As an evaluation after some steps of an epoch: both see their own batches."""
    data = ImageFolder(photos, 16)
    order = list(torch.arange(12).split(4))
    alone = [x for x, _ in data.batches("train", order, CPU)]
    tested = [x for x, _ in data.batches("test", [torch.arange(4)], CPU)]
    for workers in (0, 1):
        for found, wanted in zip(data.batches("train", order, CPU, workers), alone, strict=True):
            assert torch.equal(found[0], wanted)
            ((x, _),) = data.batches("test", [torch.arange(4)], CPU, workers)
            assert torch.equal(x, tested[0])
    data.close()


def test_a_worker_has_one_thread(photos):
    code = f"""
        import torch
        from pathlib import Path
        from resnet_fast.training import loader
        from resnet_fast.training.imagefolder import ImageFolder
        torch.set_num_threads(3)
        loader.read_image = lambda *_: torch.full((3, 16, 16), torch.get_num_threads()).byte()
        data = ImageFolder(Path({str(photos)!r}), 16)
        for workers in (0, 1):
            ((x, _),) = data.batches("test", [torch.arange(2)], torch.device("cpu"), workers)
            print(x.unique().tolist())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["[3]", "[1]"], done.stderr


def memory(kind):
    """A batch [6,3,32,32] of uint8 or floats."""
    x = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    return x if kind == torch.uint8 else x.to(kind) / 255


@needs_torchvision
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_tensors_in_memory(dtype):
    """Each image from its own seed, and what is erased becomes the mean."""
    x, seeds = memory(dtype), [seed_of(0, 0, i) for i in range(6)]
    before = x.clone()
    transform = Transform("crop", 9, 1.0)
    y = augmented(x, transform, MEAN, seeds)
    assert torch.equal(x, before) and y.dtype == dtype and y.shape == x.shape
    last = augmented(x[4:], transform, MEAN, seeds[4:])
    assert torch.equal(last, y[4:])
    other = augmented(x, transform, MEAN, [seed_of(0, 1, i) for i in range(6)])
    assert (other != y).flatten(1).any(1).all()
    erased = augmented(x, Transform("crop", random_erasing=1.0), MEAN, seeds)
    value = [round(255 * m) for m in MEAN] if dtype == torch.uint8 else MEAN
    where = erased == torch.tensor(value).view(3, 1, 1)
    changed = (erased != x).any(1)
    assert changed.flatten(1).any(1).all() and where.all(1)[changed].all()
    assert 0.015 < changed.float().mean() < 0.35
    normal = imagenet(32).normalize(erased).permute(0, 2, 3, 1)[changed]
    assert normal.abs().max() < 0.01
    assert augmented(x, Transform("crop"), MEAN, seeds) is x
    assert len(augmented(x[:0], transform, MEAN, [])) == 0


@needs_torchvision
def test_randaugment_of_a_tensor_is_torchvisions():
    from torchvision.transforms import v2

    x = memory(torch.uint8)
    y = augmented(x, Transform("none", 15), MEAN, range(6))
    steps = v2.RandAugment(2, 15, interpolation=v2.InterpolationMode.BILINEAR)
    for i in range(6):
        torch.manual_seed(i)
        assert torch.equal(y[i], steps(x[i]))


@needs_torchvision
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mixup, cutmix", [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixed_batches(mixup, cutmix, layout):
    """Each label's share is its share of the pixels."""
    y = torch.tensor([0, 1, 2, 1])
    x = torch.eye(4)[y].view(4, 4, 1, 1).expand(-1, -1, 16, 16)  # channel = class
    x = x.contiguous(memory_format=layout)
    before, kinds = torch.get_rng_state(), Counter()
    for seed in range(20):
        a, b = mixed(x, y, 4, mixup, cutmix, seed)
        assert b.shape == (4, 4) and b.dtype == torch.float32
        assert a.is_contiguous(memory_format=layout)
        torch.testing.assert_close(a.mean((2, 3)), b)
        torch.testing.assert_close(b.sum(1), torch.ones(4))
        kinds["cutmix" if ((a == 0) | (a == 1)).all() else "mixup"] += 1
        again = mixed(x, y, 4, mixup, cutmix, seed)
        assert torch.equal(a, again[0]) and torch.equal(b, again[1])
    assert kinds.keys() == {n for n, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha}
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_to_mix_is_unchanged(monkeypatch):
    """And needs no torchvision."""
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    assert all(a is b for a, b in zip(mixed(x, y, 2, 0, 0.0, 1), (x, y), strict=True))
    assert augmented(x, Transform("none"), MEAN, [0, 1]) is x


class OfAnotherTorch:
    """A finder of a torchvision whose import fails as one built for another torch."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision.transforms.v2":
            raise RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize("kind", ["absent", "of another torch"])
def test_without_torchvision(photos, monkeypatch, kind):
    """The error says what to install and how to do without; the other augmentations read on."""
    if kind == "absent":
        monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    else:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            monkeypatch.delitem(sys.modules, name)
        for name in ("torchvision", "torchvision.transforms"):
            monkeypatch.setitem(sys.modules, name, type(sys)(name))
            monkeypatch.setattr(sys.modules[name], "__path__", [], raising=False)
        monkeypatch.setattr(sys, "meta_path", [OfAnotherTorch(), *sys.meta_path])
    data, order = ImageFolder(photos, 16), [torch.arange(2)]
    says = r"pip install torchvision.*crop-flip or none \(--augment\)"
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    for call in (
        lambda: list(data.batches("train", order, CPU, 1, transform=CROPS)),
        lambda: augmented(x, Transform("crop", 9), MEAN, [0, 1]),
        lambda: mixed(x, y, 2, 0.2, 0, 1),
    ):
        with pytest.raises(MissingPackage, match=says) as raised:
            call()
        assert "\n" not in str(raised.value)
    assert len(list(data.batches("train", order, CPU, transform=Transform("crop-flip", 9)))) == 1


def test_transforms_are_checked():
    for options, says in (
        ({"augment": "mixup"}, "augment: expected one of none, crop, crop-flip, resized-crop-flip"),
        ({"randaugment": 31}, "randaugment: expected at most 30, got 31"),
        ({"randaugment": -1}, "randaugment: expected None or a magnitude of 0 to 30, got -1"),
        ({"randaugment": 0.5}, "randaugment: expected None or a magnitude of 0 to 30, got 0.5"),
        ({"random_erasing": 1.5}, "random_erasing: expected a probability of 0 to 1, got 1.5"),
        ({"random_erasing": True}, "random_erasing: expected a probability of 0 to 1, got True"),
    ):
        with pytest.raises(ValueError, match=says):
            Transform(**{"augment": "crop", **options})


@needs_torchvision
def test_wrong_batches_are_named():
    with pytest.raises(ValueError, match="seeds: expected 2, one per image of x, got 1"):
        augmented(torch.rand(2, 3, 8, 8), ALL, MEAN, [0])
    with pytest.raises(ValueError, match="randaugment: expected images of 1 or 3 channels, got 4"):
        augmented(torch.rand(1, 4, 8, 8), Transform("crop", 9), (0.5,) * 4, [0])
