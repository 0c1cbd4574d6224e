"""Folders and image files as they lie around: what is taken, what is skipped, how it is read."""

import os
import warnings

import numpy as np
import pytest
import torch
from training_cases import RECIPE, model

from resnet_fast.training import evaluate, fit, load_data
from resnet_fast.training.imagefolder import ImageFolder
from resnet_fast.training.images import SUFFIXES, Skipped, images_in, read_image
from resnet_fast.training.preprocessing import INTERPOLATIONS, Preprocessing, imagenet

Image = pytest.importorskip("PIL.Image")
CPU = torch.device("cpu")
ONE = Preprocessing(4, 4, (0.5,), (0.5,))


def picture(path, size=(40, 30), shade=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(shade).integers(0, 60, (size[1], size[0], 3)) + shade
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Two classes of ten images, without parts."""
    for label, name in enumerate(("cat", "dog")):
        for i in range(10):
            picture(tmp_path / name / f"{i}.png", shade=20 + 180 * label)
    return tmp_path


def test_what_no_image_can_be_is_skipped_and_counted(photos):
    cat = photos / "cat"
    clean = ImageFolder(photos, 16).files
    for path in (cat / "._0.png", cat / ".hidden" / "a.png", cat / ".ipynb_checkpoints" / "0.png",
                 photos / "__MACOSX" / "cat" / "0.png", photos / ".git" / "a.png"):  # fmt: skip
        picture(path)
    (cat / "Thumbs.db").write_bytes(b"db")
    (cat / "notes.txt").write_text("text")
    (cat / "empty.jpg").touch()
    (cat / "folder.jpg").mkdir()
    (photos / "class.png").mkdir()
    (cat / "gone.png").symlink_to(photos / "nowhere.png")
    (photos / "gone").symlink_to(photos / "nowhere")
    (photos / "labels.csv").write_text("a,b")
    picture(photos / "stray.png")
    os.mkfifo(cat / "pipe.png")
    data = ImageFolder(photos, 16)
    assert data.classes == ("cat", "dog")
    assert data.files == clean
    assert data.skipped == {
        "hidden": 5, "of other types": 3, "empty": 1, "folders named like an image": 2,
        "broken links": 2, "outside of the class folders": 1, "pipes or devices": 1,
    }  # fmt: skip
    assert str(data.skipped).startswith("broken links: 2, empty: 1, folders named like an image: 2")


def test_links_are_followed_and_loops_end(photos, tmp_path):
    real = tmp_path.parent / f"{tmp_path.name}-birds"
    for i in range(3):
        picture(real / "deep" / f"{i}.jpg")
    (real / "deep" / "loop").symlink_to(real)
    (photos / "bird").symlink_to(real)
    (photos / "cat" / "linked.png").symlink_to(photos / "dog" / "0.png")
    data = ImageFolder(photos, 16)
    assert data.classes == ("bird", "cat", "dog")
    counts = np.bincount([label for _, label in data.files["all"]])
    assert counts.tolist() == [3, 11, 10]
    assert data.skipped == {"links to a folder above": 1}
    (photos / "dog" / "again").symlink_to(real / "deep")
    assert len(images_in(photos / "dog", Skipped())) == 13  # as torchvision counts them


def test_all_suffixes_of_torchvision_count(tmp_path):
    for suffix in (".jpg", ".JPEG", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"):
        assert suffix.lower() in SUFFIXES
        path = tmp_path / f"a{suffix}"
        Image.new("L" if suffix == ".pgm" else "RGB", (9, 9)).save(path)
        assert read_image(path, ONE).shape == (1, 4, 4)
    assert len(images_in(tmp_path, Skipped())) == 9


def test_evaluation_takes_all_that_it_is_given(photos):
    """"test" is what training holds out, "all" everything; with a test folder it is that."""
    data = load_data("imagefolder", photos, size=16)
    assert data.held_out
    assert [data.count(split) for split in ("train", "test", "all")] == [16, 4, 20]
    net = model()
    net.fc = torch.nn.Linear(16, 2)
    assert evaluate(net, data, split="all").confusion.sum() == 20
    assert evaluate(net, data, split="test").confusion.sum() == 4
    (photos / "train").mkdir()
    for name in ("cat", "dog"):
        (photos / name).rename(photos / "train" / name)
        picture(photos / "val" / name / "a.png")
    data = load_data("imagefolder", photos, size=16)
    assert not data.held_out
    assert [data.count(split) for split in ("train", "test", "all")] == [20, 2, 22]


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_every_split_is_evaluated_at_the_size_of_inputs(photos, split):
    """Training reads larger images, for its crops."""
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x):
            seen.append(x.shape[2:])
            return x.mean((2, 3))[:, :2]

    evaluate(Net(), load_data("imagefolder", photos, size=16), split=split)
    assert set(seen) == {(16, 16)}


def test_in_memory_all_is_both():
    data = load_data("synthetic", size=8)
    assert data.count("all") == data.count("train") + data.count("test")
    ((x, y),) = data.batches("all", [torch.tensor([0, 2000])], CPU)
    assert torch.equal(x, torch.stack([data.train_x[0], data.test_x[0]]))
    assert torch.equal(y, torch.stack([data.train_y[0], data.test_y[0]]))
    with pytest.raises(ValueError, match="split: expected one of train, test, all"):
        data.count("val")


@pytest.mark.parametrize("name", ["val", "valid", "test"])
def test_only_a_test_folder(photos, name):
    (photos / name).mkdir()
    for label in ("cat", "dog"):
        (photos / label).rename(photos / name / label)
    data = load_data("imagefolder", photos, size=16)
    assert [data.count(split) for split in ("train", "test", "all")] == [0, 20, 20]
    assert not data.held_out
    with pytest.raises(ValueError, match="data: expected images to train on and to test on, got 0"):
        fit(model(), data, RECIPE)


def test_a_class_may_be_named_test(photos):
    for i in range(5):
        picture(photos / "test" / f"{i}.png")
    assert load_data("imagefolder", photos).classes == ("cat", "dog", "test")


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_an_error_or_skipped(photos, workers):
    bad = photos / "cat" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    data = load_data("imagefolder", photos, size=16)
    chosen = [torch.arange(20)]
    with pytest.raises(ValueError, match=r"3\.png: not a readable image"):
        list(data.batches("all", chosen, CPU, workers))
    data = load_data("imagefolder", photos, size=16, on_bad_image="skip")
    ((x, y),) = data.batches("all", chosen, CPU, workers)
    assert (len(x), y.tolist()) == (19, [0] * 9 + [1] * 10)
    assert list(data.unreadable) == [str(bad)]
    net = model()
    net.fc = torch.nn.Linear(16, 2)
    found = evaluate(net, data, split="all", workers=workers)
    assert found.confusion.sum(1).tolist() == [9, 10]
    good = data.files["all"].copy()
    good.pop(3)
    data.files["all"] = good
    wanted = evaluate(net, data, split="all")
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    with pytest.raises(ValueError, match="on_bad_image: expected one of error, skip, got 'warn'"):
        load_data("imagefolder", photos, on_bad_image="warn")


def test_training_goes_on_past_bad_images(photos):
    """A bad image's place in the batch is taken by others of the batch."""
    for i in (1, 2, 3):
        (photos / "cat" / f"{i}.png").write_bytes(b"no image")
    data = load_data("imagefolder", photos, size=16, on_bad_image="skip")
    net = model()
    net.fc = torch.nn.Linear(16, 2)
    recipe = RECIPE.__class__(epochs=2, batch_size=4, lr=0.01, warmup=0.0)
    history = fit(net, data, recipe)
    assert len(history.losses) == 2 * 4
    assert len(data.unreadable) == 3
    for path, _ in data.files["train"]:
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"data: no image can be read; the first: .*png: not"):
        evaluate(net, data, split="train")
    with pytest.raises(ValueError, match=r"data: no image of a batch of 4 can be read: .*png:"):
        fit(net, data, recipe)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_batch_without_readable_images_takes_those_before(photos, batch_size):
    (photos / "cat" / "3.png").write_bytes(b"no image")
    data = load_data("imagefolder", photos, size=16, on_bad_image="skip")
    net = model()
    net.fc = torch.nn.Linear(16, 2)
    recipe = RECIPE.__class__(epochs=1, batch_size=batch_size, lr=0.01, warmup=0.0)
    assert len(fit(net, data, recipe).losses) == 16 // batch_size


def test_sixteen_bits_and_floats_are_scaled_by_their_range(tmp_path):
    """Pillow alone cuts them at 255: white or black images."""
    ramp = np.linspace(0, 65535, 16, dtype=np.uint16).reshape(4, 4)
    wanted = torch.from_numpy((ramp / 257).round().astype(np.uint8))[None]
    for suffix in ("png", "tif"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(ramp).save(path)
        assert torch.equal(read_image(path, ONE), wanted)
        colours = read_image(path, Preprocessing(4, 4, (0.5,) * 3, (0.5,) * 3))
        assert torch.equal(colours, wanted.expand(3, -1, -1))
    unit = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    for values in (unit, unit * 900 - 300):
        Image.fromarray(values).save(tmp_path / "f.tif")
        scaled = torch.from_numpy((unit * 255).round().astype(np.uint8))[None]
        assert torch.equal(read_image(tmp_path / "f.tif", ONE), scaled)
    for constant, level in ((128.0, 128), (0.5, 128), (300.0, 0)):
        Image.fromarray(np.full((4, 4), constant, np.float32)).save(tmp_path / "f.tif")
        assert (read_image(tmp_path / "f.tif", ONE) == level).all()
    grey = unit * 20 + 100
    Image.fromarray(grey).save(tmp_path / "f.tif")
    assert np.array_equal(read_image(tmp_path / "f.tif", ONE)[0], grey.round().astype(np.uint8))
    dim = unit / 2
    Image.fromarray(dim).save(tmp_path / "f.tif")
    assert read_image(tmp_path / "f.tif", ONE).max() == 128  # in 0 to 1: not stretched
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "i.tif")
    assert torch.equal(read_image(tmp_path / "i.tif", ONE), wanted)
    unit[1, 1] = np.nan
    Image.fromarray(unit).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match=r"f\.tif: .* it has values that are not finite"):
        read_image(tmp_path / "f.tif", ONE)
    wide = np.full((4, 12), 300, np.float32)
    wide[0, 0] = np.inf  # outside of the crop
    Image.fromarray(wide).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match=r"f\.tif: .* it has values that are not finite"):
        read_image(tmp_path / "f.tif", ONE)


@pytest.mark.parametrize("size", [(3000, 2), (2, 3000), (1, 1), (5000, 1)])
def test_narrow_images_take_no_time(tmp_path, size, monkeypatch):
    """Whatever is made of them has no more pixels than the crop."""
    path = picture(tmp_path / "a.png", size)
    made, resize = [], Image.Image.resize

    def resized(image, *args):
        made.append(resize(image, *args))
        return made[-1]

    monkeypatch.setattr(Image.Image, "resize", resized)
    assert read_image(path, imagenet()).shape == (3, 224, 224)
    assert [image.width * image.height <= 16 * 224 * 224 for image in made] == [True]


def test_of_a_narrow_image_the_same_pixels(tmp_path):
    """Those of the whole image resized, up to one level."""
    preprocessing = imagenet(28)
    path = picture(tmp_path / "a.png", (400, 9))
    with Image.open(path) as opened:
        whole = opened.resize((32 * 400 // 9, 32), Image.Resampling.BILINEAR)
    left, top = round((whole.width - 28) / 2), 2
    wanted = np.asarray(whole.crop((left, top, left + 28, top + 28))).transpose(2, 0, 1)
    found = read_image(path, preprocessing).numpy()
    assert np.abs(found.astype(int) - wanted).max() <= 1


def test_large_photos_are_decoded_smaller(tmp_path):
    """To at least twice the size they are resized to: the pixels differ by a few levels."""
    y, x = np.mgrid[0:1536, 0:2048] / 200
    values = np.stack([np.sin(x + y), np.cos(2 * x), np.sin(3 * y)], 2) * 100 + 128
    photo = Image.fromarray(values.astype(np.uint8))
    photo.save(tmp_path / "a.jpg", quality=95)
    photo.save(tmp_path / "a.png")
    fast, exact = (read_image(tmp_path / name, imagenet()).int() for name in ("a.jpg", "a.png"))
    difference = (fast - exact).abs().float()
    assert difference.mean() < 0.7
    assert difference.max() < 8


def test_a_photo_of_two_pictures_is_read(tmp_path):
    """MPO, as many cameras write it under the name of a JPEG."""
    one, other = (Image.new("RGB", (9, 9), (shade,) * 3) for shade in (40, 200))
    one.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[other])
    assert (read_image(tmp_path / "a.jpg", ONE).int() - 40).abs().max() <= 1


def test_no_program_is_run_for_an_image(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript, whatever the file's name is."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(ValueError, match="not a readable image"):
        read_image(path, ONE)
    assert not (tmp_path / "was-run").exists()


BROKEN = {
    "text": b"no image",
    "png header": b"\x89PNG\r\n\x1a\n" + bytes(30),
    "huge bmp": b"BM" + (26).to_bytes(4, "little") + bytes(4) + (26).to_bytes(4, "little")
    + (12).to_bytes(4, "little") + b"\xff\xff\xff\xff" + b"\x01\x00\x18\x00",
    "huge ppm": b"P6 999999999 999999999 255\n" + bytes(10),
    "empty ppm": b"P6 0 0 255\n",
    "short ppm": b"P6 9 9 255\n" + bytes(10),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named(tmp_path, kind):
    path = tmp_path / "a.png"
    path.write_bytes(BROKEN[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as raised:
            read_image(path, imagenet())
    assert str(raised.value).startswith(f"{path}: not a readable image: ")
    assert "\n" not in str(raised.value)


def test_a_pipe_or_a_folder_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path):
        with pytest.raises(ValueError, match="not a readable image: expected a regular file"):
            read_image(path, imagenet())


def test_preprocessing_is_checked():
    for values, says in (
        ((0, 4, (0.5,), (0.5,)), "size: expected at least 1 pixel, got 0"),
        ((4096, 4096, (0.5,), (0.5,)), "size: expected at most 2048, got 4096"),
        ((8, 7, (0.5,), (0.5,)), "resize: expected at least the size, 8 pixels, got 7"),
        ((8, 8, [0.5], (0.5,)), r"mean: expected one number per channel, got \[0.5\]"),
        ((8, 8, (0.5,), (0.0,)), "std: expected 1 numbers above 0"),
        ((8, 8, (0.5,), (0.5,), "box"), "interpolation: expected one of bilinear, bicubic, got"),
        ((8, 8, (0.5,), (0.5,), 3), "interpolation: expected one of bilinear, bicubic, got 3"),
    ):
        with pytest.raises(ValueError, match=says):
            Preprocessing(*values)


@pytest.mark.parametrize("resize", [40, 640], ids=["whole", "crop of a large one"])
def test_interpolation(tmp_path, resize):
    """The pixels are Pillow's with the same filter; bicubic ones of floats stay within 0 … 255."""
    path = picture(tmp_path / "a.png", size=(60, 45))
    found = {}
    for name in INTERPOLATIONS:
        preprocessing = Preprocessing(32, resize, (0.5,) * 3, (0.5,) * 3, name)
        found[name] = read_image(path, preprocessing)
    assert not torch.equal(found["bilinear"], found["bicubic"])
    if resize == 40:
        with Image.open(path) as image:
            image = image.resize((53, 40), Image.Resampling.BICUBIC).crop((10, 4, 42, 36))
        assert torch.equal(found["bicubic"].permute(1, 2, 0), torch.from_numpy(np.array(image)))
    steps = np.zeros((45, 60), np.float32)
    steps[:, 30:] = 1.0
    Image.fromarray(steps).save(tmp_path / "f.tif")
    x = read_image(tmp_path / "f.tif", Preprocessing(32, 40, (0.5,), (0.5,), "bicubic"))
    assert (x.min(), x.max()) == (0, 255)


def test_preprocessing_of_files():
    """Those of before there was an interpolation were made bilinearly."""
    old = {"size": 8, "resize": 9, "mean": [0.5], "std": [0.5]}
    assert Preprocessing.of(old).interpolation == "bilinear"
    new = Preprocessing.of({**old, "interpolation": "bicubic"})
    assert new.at(16).interpolation == "bicubic"
    with pytest.raises(ValueError, match="preprocessing: interpolation: expected one of"):
        Preprocessing.of({**old, "interpolation": None})
