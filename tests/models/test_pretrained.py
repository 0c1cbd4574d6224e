"""Published weights: the table, downloads into models, timm's repositories, class names, errors."""

import hashlib
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from file_server import serving
from torchvision_ops import why_not

import resnet_fast
from resnet_fast import cli
from resnet_fast.models import pretrained, timm_hub
from resnet_fast.models.imagenet_classes import imagenet_ids, imagenet_names, same_classes
from resnet_fast.runtime.download import NotDownloaded
from resnet_fast.runtime.files import NotWritten
from resnet_fast.runtime.optional import MissingPackage
from resnet_fast.training import load_weights
from resnet_fast.training.preprocessing import Preprocessing

ROOT = Path(__file__).resolve().parents[2]
REPO = "timm/resnet18.a1_in1k"
CONFIG = {  # as timm writes it
    "architecture": "resnet18", "num_classes": 1000, "num_features": 512, "global_pool": "avg",
    "pretrained_cfg": {
        "tag": "a1_in1k", "custom_load": False, "input_size": [3, 224, 224],
        "test_input_size": [3, 288, 288], "fixed_input_size": False, "interpolation": "bicubic",
        "crop_pct": 0.95, "test_crop_pct": 1.0, "crop_mode": "center", "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25], "num_classes": 1000, "first_conv": "conv1", "classifier": "fc",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def weights():
    """A state dict of resnet18."""
    torch.manual_seed(5)
    return resnet_fast.create_model("resnet18", zero_init_residual=False).state_dict()


@pytest.fixture(scope="module")
def body(weights):
    """The same as a file of torch.save."""
    file = io.BytesIO()
    torch.save(weights, file)
    return file.getvalue()


@pytest.fixture
def server(monkeypatch, tmp_path, body):
    """Serves `body` as torchvision's resnet18; torch.hub's folder is below tmp_path."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    digest = hashlib.sha256(body).hexdigest()[:8]
    monkeypatch.setitem(pretrained.TORCHVISION, "resnet18", {"IMAGENET1K_V1": (digest, 256)})
    with serving() as one:
        one.files[f"/resnet18-{digest}.pth"] = body
        monkeypatch.setattr(pretrained, "BASE", f"{one.url}/")
        yield one


@pytest.fixture
def hub(monkeypatch, tmp_path, weights):
    """Replaces huggingface_hub: the folder of a repository, which has CONFIG and `weights`."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights, folder / "model.safetensors")
    asked = []

    def hf_hub_download(repo, name):
        asked.append((repo, name))
        if not (folder / name).exists():
            raise RuntimeError(f"404 Client Error.\n\nEntry Not Found for {name}")
        return str(folder / name)

    constants = types.SimpleNamespace(HF_HUB_CACHE="/cache/hub")
    fake = types.SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", constants)
    return types.SimpleNamespace(folder=folder, asked=asked)


def assert_equal(model, weights, head=True):
    for key, value in model.state_dict().items():
        if head or not key.startswith("fc."):
            assert torch.equal(value, weights[key]), key


def image(path, size=(340, 270)):
    """A picture of noise."""
    import numpy as np
    from PIL import Image

    values = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def test_the_table_is_torchvisions():
    """Names, files, defaults and preprocessing of every ResNet; class names too."""
    why = why_not("torchvision")
    if why:
        pytest.skip(why)
    from torchvision import models

    wanted = [n for n in models.list_models(models) if n.startswith(("resn", "wide_resnet"))]
    assert sorted(pretrained.TORCHVISION) == wanted
    for model in wanted:
        enum = models.get_model_weights(model)
        assert list(pretrained.TORCHVISION[model]) == [one.name for one in enum]
        assert pretrained.find("DEFAULT", model).name == enum.DEFAULT.name
        for one in enum:
            found = pretrained.find(one.name, model)
            file = pretrained.published_file(Path("x", Path(one.url).name))
            assert (file.model, file.name) == (model, one.name)
            assert one.url.startswith(pretrained.BASE)
            asks, ours = one.transforms(), Preprocessing.of(dict(found.preprocessing))
            assert ([ours.size], [ours.resize]) == (asks.crop_size, asks.resize_size)
            assert (list(ours.mean), list(ours.std)) == (asks.mean, asks.std)
            assert (ours.interpolation, asks.antialias) == (asks.interpolation.value, True)
            assert list(found.classes) == one.meta["categories"]


def test_class_names():
    """A thousand different names and IDs, the IDs sorted as folders are."""
    assert len(set(imagenet_names())) == len(set(imagenet_ids())) == 1000
    assert list(imagenet_ids()) == sorted(imagenet_ids())
    assert (imagenet_ids()[281], imagenet_names()[281]) == ("n02123045", "tabby")
    assert same_classes(imagenet_ids(), list(imagenet_names()))
    assert same_classes(["a", "b"], ("a", "b")) and not same_classes(["b", "a"], ("a", "b"))
    assert not same_classes(imagenet_ids(), ["a"])


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"impl": "reference"}],
                         ids=["default", "plain", "reference"])  # fmt: skip
def test_create_model_has_the_tensors_of_the_file(server, weights, options):
    model = resnet_fast.create_model("resnet18", weights="IMAGENET1K_V1", **options)
    assert_equal(model, weights)
    assert model.training
    again = resnet_fast.create_model("resnet18", pretrained=True, **options)
    assert_equal(again, weights)
    assert len(server.seen) == 1


def test_other_classes_get_a_new_head(server, weights):
    model = resnet_fast.create_model("resnet18", pretrained=True, num_classes=7)
    assert_equal(model, weights, head=False)
    assert model.fc.weight.shape == (7, 512)
    assert model.fc.weight.std() > 0


def test_the_cache_is_torch_hubs(server, tmp_path, weights):
    """torch.hub loads the file that resnet_fast cached, without the network, and the reverse."""
    resnet_fast.create_model("resnet18", pretrained=True)
    (cached,) = (tmp_path / "torch" / "hub" / "checkpoints").iterdir()
    url = f"{server.url}/{cached.name}"
    found = torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
    assert found.keys() == weights.keys()
    assert len(server.seen) == 1
    cached.unlink()
    torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
    resnet_fast.create_model("resnet18", pretrained=True)
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("resnet18", {"weights": "IMAGENET1K_V2"},
         "weights: expected IMAGENET1K_V1 or DEFAULT for resnet18, or a repository timm/NAME, got "
         "'IMAGENET1K_V2'"),
        ("resnet50", {"weights": 3}, "weights: expected IMAGENET1K_V1, IMAGENET1K_V2 or DEFAULT"),
        ("preact_resnet50", {"pretrained": True},
         "pretrained: torchvision has published no weights of preact_resnet50; expected one of "),
        ("resnet18", {"pretrained": True, "weights": "DEFAULT"},
         "pretrained: expected False with weights='DEFAULT', got True"),
        ("resnet18", {"pretrained": "yes"}, "pretrained: expected True or False, got 'yes'"),
        ("resnet18", {"pretrained": True, "fused": False, "stem": "cifar"},
         r"pretrained: IMAGENET1K_V1 does not fit resnet18 with stem: conv1.weight: expected"),
        ("resnet18", {"weights": "DEFAULT", "in_channels": 1}, "fit resnet18 with in_channels: "),
        ("resnet18", {"weights": "DEFAULT", "shortcut": "zero_pad"},
         "with shortcut: layer2.0.downsample.0.weight is not expected"),
    ],
)  # fmt: skip
def test_what_does_not_exist_or_fit_is_an_error(server, name, options, says):
    """Before anything is downloaded."""
    with pytest.raises(ValueError, match=says):
        resnet_fast.create_model(name, **options)
    assert server.seen == []


def test_by_name_with_classes_and_preprocessing(server, weights):
    loaded = load_weights("DEFAULT", "resnet18")
    assert_equal(loaded.model, weights)
    assert not loaded.model.training
    assert (loaded.name, loaded.classes) == ("resnet18", imagenet_names())
    asks = loaded.preprocessing
    assert (asks.size, asks.resize, asks.interpolation) == (224, 256, "bilinear")
    assert "IMAGENET1K_V1 of resnet18, for images of 224 px" in loaded.notes[0]
    with pytest.raises(ValueError, match="weights: expected IMAGENET1K_V1 or DEFAULT for resnet18"):
        load_weights("IMAGENET1K_V2", "resnet18")


def test_a_file_of_that_name_wins(server, tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    torch.save(weights, "DEFAULT")
    loaded = load_weights("DEFAULT")
    assert (loaded.name, loaded.classes) == ("resnet18", None)
    assert server.seen == []


def test_for_training_on_imagenet_the_head_stays(server, weights):
    """Its folders are named by WordNet IDs; other classes get a new head."""
    loaded = load_weights("DEFAULT", "resnet18", classes=imagenet_ids())
    assert_equal(loaded.model, weights)
    loaded = load_weights("DEFAULT", "resnet18", classes=("a", "b"))
    assert_equal(loaded.model, weights, head=False)
    assert loaded.model.fc.out_features == 2
    assert "a new head of 2 classes" in loaded.notes[-1]


def test_a_file_under_its_published_name(server, tmp_path, body, monkeypatch):
    """Its hash tells it from another of that name, which keeps ImageNet's usual preprocessing."""
    digest = hashlib.sha256(body).hexdigest()[:8]
    monkeypatch.setitem(pretrained.TORCHVISION, "resnet18", {"IMAGENET1K_V1": (digest, 232)})
    path = tmp_path / f"resnet18-{digest}.pth"
    path.write_bytes(body)
    loaded = load_weights(path)
    assert (loaded.preprocessing.resize, loaded.classes) == (232, imagenet_names())
    assert loaded.notes[0].startswith(f"{path}: IMAGENET1K_V1 of resnet18")
    other = tmp_path / "other.pth"
    path.rename(other)
    assert load_weights(other).preprocessing.resize == 256
    monkeypatch.setitem(pretrained.TORCHVISION, "resnet18", {"IMAGENET1K_V1": ("0" * 8, 232)})
    other.rename(tmp_path / "resnet18-00000000.pth")
    loaded = load_weights(tmp_path / "resnet18-00000000.pth")
    assert (loaded.preprocessing.resize, loaded.classes) == (256, None)
    assert "not torchvision's file of this name, because its SHA-256 differs" in loaded.notes[0]


def test_predict_without_weights(server, tmp_path, weights, capsys):
    """The default of resnet50, or of the model named; ImageNet's names."""
    pytest.importorskip("PIL")
    path = str(image(tmp_path / "cat.png"))
    assert cli.main(["predict", path, "--model", "resnet18", "--json"]) == 0
    out = capsys.readouterr().out
    top = json.loads(out)[0]["top"]
    assert [row["name"] for row in top] == [imagenet_names()[row["class"]] for row in top]
    assert cli.main(["predict", path]) == 2
    told = capsys.readouterr().err
    assert "resnet50-11ad3fa6.pth: not downloaded to " in told and told.count("\n") == 1
    words = ["predict", path, "--model", "resnet18", "--json", "--weights", "IMAGENET1K_V1"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == out


def test_other_commands_take_names(server, tmp_path, capsys):
    """train replaces the head and stores the classes of its data; experiment activations."""
    pytest.importorskip("PIL")
    pytest.importorskip("matplotlib")
    photos, out = tmp_path / "photos", tmp_path / "out"
    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        for i in range(5):
            image(photos / name / f"{i}.png", (40, 36))
    words = ["--model", "resnet18", "--weights", "DEFAULT"]
    train = ["train", "imagefolder", str(photos), "--size", "32", "--batch-size", "4", "--epochs",
             "1", "--workers", "0", "--augment", "crop-flip", "--out", str(out)]  # fmt: skip
    assert cli.main([*train, *words]) == 0
    assert "a new head of 2 classes replaces it" in capsys.readouterr().err
    assert load_weights(out / "model.pt").classes == ("cat", "dog")
    words += ["--image", str(photos / "cat" / "0.png"), "--out", str(tmp_path / "found")]
    assert cli.main(["experiment", "activations", *words]) == 0
    assert "resnet18 (DEFAULT)" in (tmp_path / "found" / "index.html").read_text()
    assert len(server.seen) == 1


def test_train_pretrained(server, tmp_path, weights, monkeypatch, capsys):
    """The published weights of --model, with their preprocessing at --size; frozen ones stay."""
    pytest.importorskip("PIL")
    resizes = {name: {"IMAGENET1K_V1": (digest, 232)} for name, found in
               pretrained.TORCHVISION.items() for digest, _ in [found["IMAGENET1K_V1"]]}
    monkeypatch.setattr(pretrained, "TORCHVISION", resizes)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            image(tmp_path / "photos" / name / f"{i}.png", (40, 36))
    words = ["train", "imagefolder", str(tmp_path / "photos"), "--size", "56", "--batch-size", "4",
             "--epochs", "1", "--workers", "0", "--augment", "crop-flip", "--pretrained",
             "--out", str(tmp_path / "out")]  # fmt: skip
    assert cli.main([*words, "--freeze", "stem,layer1,layer2,layer3,layer4"]) == 0
    loaded = load_weights(tmp_path / "out" / "model.pt")
    assert (loaded.name, loaded.classes) == ("resnet18", ("cat", "dog"))
    assert (loaded.preprocessing.size, loaded.preprocessing.resize) == (56, 58)
    assert_equal(loaded.model, weights, head=False)
    more = [*words[:3], *words[5:-3], *words[-2:]]  # without --size and --pretrained
    more[more.index("--epochs") + 1] = "2"
    frozen = ["--freeze", "stem,layer1,layer2,layer3,layer4"]
    assert cli.main([*more, *frozen, "--resume"]) == 0
    again = load_weights(tmp_path / "out" / "model.pt")
    assert again.preprocessing == loaded.preprocessing
    assert not torch.equal(again.model.fc.weight, loaded.model.fc.weight)
    named = [word for word in words if word != "--pretrained"][:-1]
    assert cli.main([*named, str(tmp_path / "named"), "--weights", "DEFAULT"]) == 0
    assert load_weights(tmp_path / "named" / "model.pt").name == "resnet18"
    assert cli.main([*words, "--weights", "IMAGENET1K_V1"]) == 2
    assert "--pretrained: expected no --weights" in capsys.readouterr().err
    assert len(server.seen) == 1


def test_eval_takes_folders_of_wordnet_ids(server, tmp_path, capsys):
    """A validation set of ImageNet, as it is usually sorted into folders."""
    pytest.importorskip("PIL")
    photos = tmp_path / "photos"
    one = image(tmp_path / "one.png", (12, 10))
    for name in imagenet_ids():
        (photos / "val" / name).mkdir(parents=True)
        os.link(one, photos / "val" / name / "a.png")
    words = ["eval", "imagefolder", str(photos), "--model", "resnet18", "--weights", "DEFAULT",
             "--size", "8", "--workers", "0"]  # fmt: skip
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["top1"]) == (1000, 0.001)
    (photos / "val" / "n15075141").rename(photos / "val" / "tissue")
    assert cli.main(words) == 2
    assert "the classes of DEFAULT are not those of imagefolder" in capsys.readouterr().err


def test_errors_of_a_command_are_one_line(server, tmp_path, capsys):
    """A damaged cache and one that cannot be written; status 1 for the latter."""
    path = str(image(tmp_path / "cat.png"))
    folder = tmp_path / "torch" / "hub"
    folder.parent.mkdir()
    folder.write_text("a file in the place of the folder")
    words = ["predict", path, "--model", "resnet18"]
    assert cli.main(words) == 1
    told = capsys.readouterr().err
    assert str(folder) in told and "TORCH_HOME" in told and told.count("\n") == 1
    with pytest.raises(NotWritten):
        resnet_fast.create_model("resnet18", pretrained=True)
    folder.unlink()
    resnet_fast.create_model("resnet18", pretrained=True)
    (cached,) = (folder / "checkpoints").iterdir()
    cached.write_bytes(b"damaged")
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert f"{cached}: damaged" in told and f"rm {cached}" in told and told.count("\n") == 1
    with pytest.raises(NotDownloaded, match="damaged"):
        resnet_fast.create_model("resnet18", pretrained=True)


def test_a_timm_repository(hub, weights):
    """Model, normalization, sizes and interpolation are those of its config.json."""
    assert_equal(resnet_fast.create_model("resnet18", weights=REPO), weights)
    loaded = load_weights(REPO)
    assert_equal(loaded.model, weights)
    assert (loaded.name, loaded.classes) == ("resnet18", imagenet_names())
    assert loaded.preprocessing == Preprocessing(224, 235, (0.5,) * 3, (0.25,) * 3, "bicubic")
    assert set(hub.asked) == {(REPO, "config.json"), (REPO, "model.safetensors")}
    new = resnet_fast.create_model("resnet18", weights=REPO, num_classes=3)
    assert new.fc.out_features == 3


def change(hub, **changes):
    outer = {k: v for k, v in changes.items() if k in CONFIG}
    config = {**CONFIG, **outer, "pretrained_cfg": {**CONFIG["pretrained_cfg"], **changes}}
    (hub.folder / "config.json").write_text(json.dumps(config))


def test_class_names_of_a_timm_repository(hub, weights):
    """Its own; without any, ImageNet's for 1000 classes."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    few = {**weights, "fc.weight": weights["fc.weight"][:2].clone(),
           "fc.bias": weights["fc.bias"][:2].clone()}  # fmt: skip
    save_file(few, hub.folder / "model.safetensors")
    change(hub, num_classes=2)
    assert load_weights(REPO).classes is None
    assert resnet_fast.create_model("resnet18", weights=REPO).fc.out_features == 2
    change(hub, num_classes=2, label_names=["n1", "n2"], label_descriptions={"n1": "cat"})
    assert load_weights(REPO).classes == ("cat", "n2")
    change(hub, num_classes=2, label_names={"1": "dog", "0": "cat"})
    assert load_weights(REPO).classes == ("cat", "dog")
    for wrong in (["a"], {"1": "dog", "2": "cow"}, "ab"):
        change(hub, num_classes=2, label_names=wrong)
        with pytest.raises(ValueError, match="label_names: expected 2 names, got "):
            load_weights(REPO)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "resnet26"}, "is a 'resnet26', which resnet_fast does not have; "),
        ({"architecture": None}, "architecture: expected a name, got None"),
        ({"input_size": [3, 224, 200]}, "input_size: expected .3, size, size., got"),
        ({"input_size": [3, "a", "a"]}, "input_size: expected integers"),
        ({"crop_pct": 0}, r"crop_pct: expected a number in \(0, 1\], got 0"),
        ({"crop_mode": "squash"}, "crop_mode: expected 'center', got 'squash'"),
        ({"global_pool": "max"}, "global_pool: expected 'avg', got 'max'"),
        ({"num_classes": 0}, "num_classes: expected a positive integer, got 0"),
        ({"mean": None}, "preprocessing: mean: expected one number per channel"),
        ({"interpolation": "lanczos"}, "interpolation: expected one of bilinear, bicubic, got"),
    ],
)
def test_a_timm_repository_of_another_kind_is_refused(hub, changes, says):
    change(hub, **changes)
    with pytest.raises(ValueError, match=says) as raised:
        load_weights(REPO)
    assert REPO in str(raised.value)


def test_wrong_timm_repositories(hub, weights):
    with pytest.raises(ValueError, match=f"weights: {REPO} is a resnet18, not a resnet50; "):
        resnet_fast.create_model("resnet50", weights=REPO)
    with pytest.raises(ValueError, match="fit resnet18 with planes: "):
        resnet_fast.create_model("resnet18", weights=REPO, planes=32)
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"conv1.weight": weights["conv1.weight"]}, hub.folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit resnet18: bn1.weight is missing"):
        resnet_fast.create_model("resnet18", weights=REPO)
    (hub.folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"model.safetensors: damaged: .*; remove it and"):
        resnet_fast.create_model("resnet18", weights=REPO)
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(NotDownloaded) as raised:
        load_weights(REPO)
    assert str(raised.value) == (
        f"{REPO}: model.safetensors: not downloaded to /cache/hub: RuntimeError: 404 Client Error.;"
        f" to download it by hand: hf download {REPO}"
    )
    (hub.folder / "config.json").write_text("[")
    with pytest.raises(ValueError, match=f"{REPO}: config.json: Expecting value"):
        load_weights(REPO)


def test_what_is_not_installed_is_said(monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackage, match=r"pip install huggingface_hub") as raised:
        load_weights(REPO)
    assert str(raised.value).startswith(f"weights {REPO} need huggingface_hub")


def test_a_path_below_a_folder_named_timm_is_a_path():
    with pytest.raises(ValueError, match=r"timm/resnet18.pth: no such file"):
        load_weights("timm/resnet18.pth")


def test_huggingface_hub_itself(tmp_path, weights):
    """HF_ENDPOINT and HF_HOME, then HF_HUB_OFFLINE with the cache, then without one."""
    why = why_not("huggingface_hub.file_download")
    if why:
        pytest.skip(why)
    save = pytest.importorskip("safetensors.torch").save
    script = (
        "import sys, resnet_fast\n"
        f"model = resnet_fast.create_model('resnet18', weights={REPO!r})\n"
        "print(model.fc.weight.double().sum().item())"
    )
    with serving() as server:
        base = f"/{REPO}/resolve/main/"
        server.files = {f"{base}config.json": json.dumps(CONFIG).encode(),
                        f"{base}model.safetensors": save(weights)}  # fmt: skip
        server.headers = {"X-Repo-Commit": "0" * 40}

        def run(home, **env):
            env = {**os.environ, "HF_HOME": str(tmp_path / home), "NO_PROXY": "127.0.0.1",
                   "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_TELEMETRY": "1", **env}  # fmt: skip
            words = [sys.executable, "-c", script]
            return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)

        wanted = [weights["fc.weight"].double().sum().item()]
        first = run("home")
        assert list(map(float, first.stdout.split())) == wanted, first.stderr
        count = len(server.seen)
        again = run("home", HF_HUB_OFFLINE="1")
        assert list(map(float, again.stdout.split())) == wanted, again.stderr
        offline = run("other", HF_HUB_OFFLINE="1")
        assert len(server.seen) == count
    last = offline.stderr.strip().splitlines()[-1]
    assert f"NotDownloaded: {REPO}: config.json: not downloaded to {tmp_path}/other/hub: " in last
    assert last.endswith(f"hf download {REPO}")


def test_pixels_of_a_timm_repository_are_timms(tmp_path):
    """Its eval transform of the same configuration."""
    why = why_not("timm")
    if why:
        pytest.skip(why)
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    from resnet_fast.training.images import read_image

    path = image(tmp_path / "a.png")
    config = CONFIG["pretrained_cfg"]
    transform = create_transform(**resolve_data_config(pretrained_cfg=config))
    preprocessing = Preprocessing.of(dict(timm_hub._config(CONFIG).preprocessing))
    found = preprocessing.normalize(read_image(path, preprocessing)[None])[0]
    torch.testing.assert_close(found, transform(Image.open(path)), rtol=1e-5, atol=1e-5)
