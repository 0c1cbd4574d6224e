"""`resnet-fast train`, `eval` and `predict`: what they write, print and refuse."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision_ops import why_not
from training_cases import RECIPE, data, metrics, model

import resnet_fast
from resnet_fast import cli
from resnet_fast.commands import evaluate as eval_command
from resnet_fast.commands import train as train_command
from resnet_fast.dispatch import backends
from resnet_fast.runtime.files import NotWritten
from resnet_fast.training import Evaluation, Recipe, evaluate, fit, load_data
from resnet_fast.training import checkpoint as files
from resnet_fast.training.checkpoint import ModelSpec
from resnet_fast.training.history import COLUMNS, History
from resnet_fast.training.report import Log, plot_curves
from resnet_fast.training.weights import load_weights

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--size", "8", "--epochs", "2", "--batch-size", "256"]
GOAL = 0.98


@pytest.fixture(autouse=True)
def one_thread():
    """The nets are so small that more threads mostly wait for each other."""
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


def status(words):
    """The exit status, whether the command or argparse gives it."""
    try:
        return cli.main(words)
    except SystemExit as stopped:
        return stopped.code


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run by the command."""
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("short")
    assert cli.main(["train", "digits", *SHORT, "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_resnet20_reads_digits(tmp_path, capsys):
    """98% of the test scans; that the reference has the same curve is test_training's."""
    assert cli.main(["train", "digits", "--out", str(tmp_path)]) == 0
    reached = rows(tmp_path)[-1]["test_accuracy"]
    assert reached >= GOAL
    capsys.readouterr()
    words = ["eval", "digits", "--weights", str(tmp_path / "model.pt"), "--json"]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(reached)


def test_what_a_run_writes(trained):
    names = {path.name for path in trained.iterdir()} - {"tensorboard"}
    figures = {"metrics.csv", "metrics.jsonl", "curves.png"}
    assert names == {".lock", "checkpoints", "model.pt", *figures}
    found = rows(trained)
    assert [row["epoch"] for row in found] == [1, 2]
    assert all(list(row) == list(COLUMNS) for row in found)
    with open(trained / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items()} for row in table] == found
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    content = files.read(trained / "model.pt")
    assert content["spec"] == {
        "name": "cifar_resnet20", "options": {"num_classes": 10, "in_channels": 3}
    }  # fmt: skip
    assert content["classes"] == [str(i) for i in range(10)]
    assert content["preprocessing"]["size"] == 8
    recipe = Recipe(**content["recipe"])
    assert (recipe.epochs, recipe.batch_size, recipe.lr) == (2, 256, 0.05)
    assert "training" not in content


def test_one_line_an_epoch(tmp_path, capsys):
    assert cli.main(["train", "digits", *SHORT, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.err == ""  # no bars where there is no terminal
    ran = backends.chosen("bn_act", "auto", "cpu", torch.float32)
    assert re.search(rf"^model   cifar_resnet20, .*, impl {ran}\b", said.out, re.MULTILINE)
    lines = [line for line in said.out.splitlines() if line.startswith("epoch")]
    for line, row in zip(lines, rows(tmp_path), strict=True):
        assert line.startswith(f"epoch {row['epoch']}/2")
        for word in ("train loss", "test loss", "accuracy", "lr", "images/s", "left"):
            assert word in line
        assert f"{row['test_accuracy']:.2%}" in line
    assert "cifar_resnet20, 0.27 M parameters" in said.out
    assert "curves.png" in said.out.splitlines()[-1]


@pytest.mark.parametrize(("every", "steps"), [("5", [5, 10]), ("0", []), (None, [])])
def test_a_line_every_few_steps(tmp_path, capsys, every, steps):
    """Where there is no terminal every 100, which an epoch of 13 steps does not reach."""
    words = ["train", "synthetic", "--epochs", "2", "--batch-size", "150", "--size", "8",
             "--out", str(tmp_path)]  # fmt: skip
    assert cli.main(words if every is None else [*words, "--log-every", every]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "  step " in line]
    found = [re.match(r"epoch (\d)/2  step (\d+)/13  loss (\d\.\d{4})  lr \S+  \d+ images/s$", line)
             for line in lines]  # fmt: skip
    assert [(int(m[1]), int(m[2])) for m in found] == [(e, s) for e in (1, 2) for s in steps]


@pytest.mark.parametrize(("terminal", "every"), [(True, 0), (False, 100)])
def test_lines_where_there_is_no_terminal(monkeypatch, terminal, every):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert train_command._log_every(None) == every
    assert train_command._log_every(7) == 7


def test_bars_on_a_terminal(tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["train", "digits", *SHORT, "--out", str(tmp_path)]) == 0
    for word in ("epoch 1/2", "epoch 2/2", "images/s", "<00:0", "/1280"):
        assert word in terminal.getvalue()


def test_every_option_reaches_the_recipe(monkeypatch, tmp_path):
    """As it was given, and with the data set's value where it was not."""
    asked = {
        "epochs": 7, "batch_size": 50, "optimizer": "lars", "lr": 0.2, "momentum": 0.8,
        "nesterov": False, "weight_decay": 0.1, "decay_norms": False, "schedule": "step",
        "milestones": (0.2, 0.6), "warmup": 3.0, "label_smoothing": 0.2, "ema": 0.5, "clip": 2.0,
        "accumulate": 5, "augment": "none", "randaugment": 7, "random_erasing": 0.1, "mixup": 0.2,
        "cutmix": 1.0, "freeze": ("stem", "layer1"), "precision": "bf16", "channels_last": False,
        "checkpointing": True, "sync_bn": True, "deterministic": True, "seed": 9,
    }  # fmt: skip
    words = []
    for name, value in asked.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [
            f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        ]  # fmt: skip
    seen = {}

    def caught(net, data, recipe, **options):
        seen.update(recipe=recipe, net=net, **options)
        return History([dict.fromkeys(COLUMNS, 1.0)], [1.0])

    monkeypatch.setattr(train_command, "fit", caught)
    monkeypatch.setattr(train_command, "plot_curves", lambda *a: None)
    words = ["train", "digits", "--impl", "reference", "--out", str(tmp_path), *words]
    assert cli.main(words) == 0
    assert asdict(seen["recipe"]) == {**asked, "compile": False}
    assert seen["net"].layer1[0].impl == "reference"
    assert (seen["out"], seen["resume"]) == (tmp_path, False)
    assert cli.main(["train", "digits", "--compile", "--resume"]) == 0
    assert seen["recipe"].compile
    assert seen["recipe"].nesterov  # the digits' own
    assert (seen["out"], seen["resume"]) == (Path("runs/digits-cifar_resnet20"), True)
    first = seen["net"].conv1.weight
    assert cli.main(["train", "digits"]) == 0
    assert torch.equal(seen["net"].conv1.weight, first)
    assert cli.main(["train", "digits", "--seed", "1"]) == 0
    assert not torch.equal(seen["net"].conv1.weight, first)


@pytest.mark.slow
def test_sigterm_and_resume(tmp_path):
    """Status 143, a checkpoint, and a second command that ends as if nothing had been."""
    words = ["train", "digits", *SHORT, "--epochs", "5", "--out"]  # seconds in which to stop it
    command = [sys.executable, "-m", "resnet_fast", *words, str(tmp_path / "parts")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("epoch 1/5"):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")
    assert "stopped by SIGTERM" in out
    assert "continue with --resume" in out
    assert cli.main([*words, str(tmp_path / "parts"), "--resume"]) == 0
    assert cli.main([*words, str(tmp_path / "whole")]) == 0
    outs = (tmp_path / "parts", tmp_path / "whole")
    ours, whole = (metrics(History(rows(out))) for out in outs)
    assert ours == whole
    ours, whole = (files.read(out / "model.pt")["weights"] for out in outs)
    assert all(torch.equal(ours[key], value) for key, value in whole.items())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("train cifar10", "path: cifar10 needs the path of its file or folder"),
        ("train cifar10 nowhere.tar.gz", "nowhere.tar.gz: no such file or folder"),
        ("train imagefolder nowhere", "nowhere: no such folder"),
        ("train digits --epochs 0", "epochs: expected an integer of at least 1, got 0"),
        ("train digits --resume nowhere.pt", "nowhere.pt: no such file"),
        ("train digits --batch-size 5000", "batch_size: expected at most the 1437"),
        ("train synthetic --workers -1", "--workers: expected an integer from 0 to 1024, got '-1'"),
        ("train digits --epochs 1" + "0" * 30, "epochs: expected at most 1000000, got 1"),
        ("train digits --batch-size 1" + "0" * 30, "batch_size: expected at most 1000000"),
        ("train digits --epochs 1" + "0" * 5000, "--epochs: invalid int value"),
        ("train digits --size 1000000", "--size: expected an integer from 8 to 2048"),
        ("train digits --seed 18446744073709551616", "seed: expected a signed 64-bit integer"),
        ("train digits --momentum 2", "momentum: expected a number from 0 to less than 1, got 2.0"),
        ("train digits --lr nan", "lr: expected a number of at least 0, got nan"),
        ("train digits --out {trained}/model.pt", "--out: '{trained}/model.pt' is not a folder"),
        ("train digits --out {trained}/model.pt/a", "--out: '{trained}/model.pt' is not a folder"),
        ("train digits --key model", "--key: expected --weights too"),
        ("train digits --weights nowhere.pt", "nowhere.pt: no such file"),
        ("train digits --on-bad-image warn", "--on-bad-image: invalid choice"),
        ("verify --quick --json {trained}", "--json: expected a file, got the folder '{trained}'"),
        ("verify --quick --json {trained}/model.pt/a", "--json: '{trained}/model.pt' is not a"),
        ("experiment lesion --out {trained}/model.pt", "--out: '{trained}/model.pt' is not a fold"),
        ("experiment lesion --seed 18446744073709551616", "--seed: expected an integer from"),
        ("experiment lesion --planes 1" + "0" * 30, "--planes: expected at most 2147483647"),
        ("experiment lesion --depth 1000000000", "--depth: expected an integer from 1 to 10000"),
        ("eval digits --weights {trained}/model.pt --batch-size 1" + "0" * 30, "--batch-size: exp"),
        ("predict a.png --weights {trained}/model.pt --json --csv", "not allowed with argument"),
        ("train digits --impl triton --precision bf16", "--impl triton cannot run"),
        ("eval digits --weights nowhere.pt", "nowhere.pt: no such file"),
        ("eval digits --weights {trained}/model.pt --batch-size 0", "--batch-size: expected"),
        ("eval digits --weights {trained}/model.pt --workers -2", "--workers: expected an integer"),
        ("eval digits --weights {trained}/model.pt --size 0", "--size: expected an integer from 8"),
        ("predict a.png --weights {trained}/model.pt --size 0", "--size: expected an integer"),
        ("predict {trained}/curves.png --weights nowhere.pt", "nowhere.pt: no such file"),
        ("predict a.png --weights {trained}/model.pt", "a.png: no such file or folder"),
        ("predict {trained}/curves.png --weights {trained}/metrics.csv", "csv: damaged, or not"),
        ("predict a.png --weights {trained}/model.pt --top 0", "--top: expected an integer from 1"),
        ("predict {trained}/curves.png --weights {trained}/model.pt --classes nowhere",
         "nowhere: not a readable"),
        ("predict {trained}/curves.png --weights {trained}/model.pt --model resnet18", "model: "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_line(trained, capsys, monkeypatch, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    words = words.format(trained=trained).split()
    assert status(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"resnet-fast {words[0]}")
    assert ": error: " in said.err
    assert says.format(trained=trained) in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("command", ["train digits", "eval digits --weights a", "predict a.png"])
def test_a_model_that_is_not_there_is_named(capsys, command):
    with pytest.raises(SystemExit) as raised:
        cli.main([*command.split(), "--model", "resnet21"])
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert "argument --model: expected one of resnet_fast.list_models(), got 'resnet21'" in said
    assert "did you mean" in said


def test_a_run_is_not_overwritten_and_a_torn_checkpoint_not_used(tmp_path, capsys):
    words = ["train", "digits", *SHORT, "--out", str(tmp_path)]
    assert cli.main(words) == 0
    assert cli.main(words) == 2
    assert f"out: {tmp_path} has files of another run" in capsys.readouterr().err
    first, last = files.checkpoints(tmp_path / "checkpoints")
    last.write_bytes(last.read_bytes()[:1000])
    assert cli.main([*words, "--resume"]) == 2
    said = capsys.readouterr().err
    assert f"{last}: damaged" in said
    assert f"--resume {first}" in said
    assert cli.main([*words, "--resume", str(first)]) == 0


def test_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((Path(folder), purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    history = fit(model(), data(), RECIPE, out=tmp_path)
    begun, *figures, closed = written
    assert begun == (tmp_path / "tensorboard", 1)
    assert closed == "closed"
    wanted = [(k, row[k], row["epoch"]) for row in history.epochs for k in COLUMNS[1:]]
    assert figures == wanted
    written.clear()
    fit(model(), data(), RECIPE, out=tmp_path, resume=True)
    assert written[0] == (tmp_path / "tensorboard", 4)


def test_what_diverged_is_still_json(tmp_path):
    history = History([{**dict.fromkeys(COLUMNS, 1), "train_loss": float("nan")}], [1.0])
    Log(tmp_path).epoch(history)
    with open(tmp_path / "metrics.jsonl") as file:
        (row,) = (json.loads(line, parse_constant=pytest.fail) for line in file)
    assert row == {**dict.fromkeys(COLUMNS, 1), "train_loss": None}
    assert ",nan," in (tmp_path / "metrics.csv").read_text()


def test_curves_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["train", "digits", *SHORT, "--out", str(tmp_path)]) == 0
    assert "no curves.png: curves need matplotlib (pip install" in capsys.readouterr().out
    assert not (tmp_path / "curves.png").exists()


def test_curves_of_one_epoch(tmp_path):
    pytest.importorskip("matplotlib")
    history = History([dict.fromkeys(COLUMNS, 1)], [3.0, 2.0])
    plot_curves(history, tmp_path / "curves.png", "one epoch")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_eval_says_what_evaluate_finds(trained, capsys):
    weights = str(trained / "model.pt")
    assert cli.main(["eval", "digits", "--weights", weights, "--json", "--split", "train"]) == 0
    found = json.loads(capsys.readouterr().out)
    loaded = load_weights(weights)
    wanted = evaluate(loaded.model, load_data("digits", size=8), split="train")
    assert found["images"] == 1437
    assert found["top1"] == wanted.accuracy
    assert found["top5"] == wanted.top5
    assert found["loss"] == pytest.approx(wanted.loss)
    assert found["confusion"] == wanted.confusion.tolist()
    assert [row["images"] for row in found["classes"]] == wanted.confusion.sum(1).tolist()
    last = sorted((trained / "checkpoints").iterdir())[-1]
    assert cli.main(["eval", "digits", "--weights", str(last)]) == 0
    assert f"top-1 {rows(trained)[-1]['test_accuracy']:.2%}" in capsys.readouterr().out


def test_tables_of_an_evaluation():
    confusion = torch.tensor([[3, 1, 0], [0, 0, 2], [0, 0, 0]])
    found = Evaluation(0.5, 0.5, 1.0, confusion)
    text = eval_command.text(found, ("cat", "dog", "a long name"))
    assert text.splitlines() == [
        "top-1 50.00%  top-5 100.00%  loss 0.5000  (6 images)",
        "",
        "class        images   recall  precision",
        "cat               4   75.00%    100.00%",
        "dog               2    0.00%      0.00%",
        "a long name       0        -      0.00%",
        "",
        "confusion matrix: rows are classes, columns are predictions",
        "              0 1 2",
        "0 cat         3 1 0",
        "1 dog         0 0 2",
        "2 a long name 0 0 0",
    ]
    many = torch.zeros(21, 21, dtype=torch.int64)
    many[3, 4], many[5, 5], many[2, 1] = 2, 9, 7
    names = tuple(f"c{i}" for i in range(21))
    text = eval_command.text(Evaluation(0.5, 0.5, 1.0, many), names)
    assert text.splitlines()[-3:] == [
        "most frequent errors: images, class, prediction",
        "     7  c2 as c1",
        "     2  c3 as c4",
    ]


def test_eval_refuses_other_classes(trained, capsys):
    weights = str(trained / "model.pt")
    assert cli.main(["eval", "synthetic", "--weights", weights]) == 2
    assert "are not those of synthetic" in capsys.readouterr().err


@pytest.fixture
def pictures(tmp_path):
    """Three images of other shapes and modes."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    paths = []
    for i, (shape, mode) in enumerate([((90, 70, 3), "RGB"), ((64, 99, 3), "RGB"),
                                       ((80, 80), "L")]):  # fmt: skip
        paths.append(tmp_path / f"{i}.png")
        image.fromarray(rng.integers(256, size=shape, dtype=np.uint8), mode).save(paths[-1])
    return paths


def test_predict_by_hand_from_a_state_dict(tmp_path, pictures, capsys):
    """A file such as torchvision's: Pillow, ImageNet's constants and the plain net, written out."""
    from PIL import Image

    torch.manual_seed(0)
    plain = resnet_fast.create_model("resnet18", fused=False)
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    torch.save(plain.state_dict(), tmp_path / "resnet18-f37072fd.pth")
    words = ["predict", *map(str, pictures), "--weights", str(tmp_path / "resnet18-f37072fd.pth")]
    assert cli.main([*words, "--size", "56", "--json", "--batch-size", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["image"] for one in found] == list(map(str, pictures))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for one, path in zip(found, pictures, strict=True):
        image = Image.open(path).convert("RGB")
        width, height = (int(64 * side / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - 56) / 2), round((height - 56) / 2)
        values = np.asarray(image.crop((left, top, left + 56, top + 56))) / 255
        x = torch.from_numpy((values - mean) / std).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            shares = plain.eval()(x)[0].softmax(0)
        values, labels = shares.topk(5)
        assert [row["class"] for row in one["top"]] == labels.tolist()
        assert [row["name"] for row in one["top"]] == list(map(str, labels.tolist()))
        probabilities = [row["probability"] for row in one["top"]]
        assert probabilities == pytest.approx(values.tolist(), rel=1e-4)


def test_predict_folders_as_text_csv_and_json(trained, pictures, tmp_path, capsys):
    """Folders and files in their order; three forms of the same figures."""
    inner = tmp_path / "more" / "deep"
    inner.mkdir(parents=True)
    pictures[2].rename(inner / "2.png")
    (tmp_path / "more" / "Thumbs.db").write_bytes(b"db")
    weights = ["--weights", str(trained / "model.pt"), "--topk", "2", "--batch-size", "2"]
    words = ["predict", str(tmp_path / "more"), str(pictures[1]), *weights]
    assert cli.main([*words, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [one["image"] for one in found] == [str(inner / "2.png"), str(pictures[1])]
    assert said.err == "resnet-fast predict: skipped in folders (of other types: 1)\n"
    assert cli.main([*words, "--csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["image"], int(row["rank"]), row["name"], float(row["probability"]))
            for row in table] == [
        (one["image"], rank, top["name"], top["probability"])
        for one in found for rank, top in enumerate(one["top"], 1)
    ]  # fmt: skip
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(".png")] == [one["image"] for one in found]
    assert status(["predict", str(tmp_path / "more" / "deep"), *weights, "--workers", "1"]) == 0
    (tmp_path / "none").mkdir()
    assert status(["predict", str(tmp_path / "none"), *weights]) == 2
    assert "none: no images in this folder" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_predict_shows_the_good_images_and_names_the_bad(trained, pictures, capsys, workers):
    pictures[1].write_bytes(b"no image")
    words = ["predict", *map(str, pictures), "--weights", str(trained / "model.pt"), "--json"]
    assert cli.main([*words, "--batch-size", "1", "--workers", workers]) == 1
    said = capsys.readouterr()
    images = [one["image"] for one in json.loads(said.out)]
    assert images == [str(pictures[0]), str(pictures[2])]
    assert said.err.startswith(f"resnet-fast predict: error: {pictures[1]}: not a readable image")


@pytest.fixture
def photos(tmp_path):
    """Two classes of ten images, one of them unreadable."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            values = rng.integers(0, 60, (20, 24, 3)) + 190 * label
            image.fromarray(values.astype(np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "dog" / "4.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_a_folder_from_weights_to_figures(photos, trained, tmp_path, capsys):
    """Fine-tune other weights past a bad image, evaluate all of a folder, say what was skipped."""
    if why_not("torchvision.transforms.v2"):
        pytest.skip(why_not("torchvision.transforms.v2"))
    (photos / "cat" / ".hidden.png").write_bytes(b"x")
    out = tmp_path / "out"
    words = ["train", "imagefolder", str(photos), "--weights", str(trained / "model.pt"),
             "--size", "8", "--epochs", "1", "--batch-size", "4", "--lr", "1e-3",
             "--out", str(out)]  # fmt: skip
    assert cli.main(words) == 2
    assert "4.png: not a readable image" in capsys.readouterr().err
    shutil.rmtree(out)
    assert cli.main([*words, "--on-bad-image", "skip"]) == 0
    said = capsys.readouterr()
    assert "model   cifar_resnet20" in said.out
    assert "the head has 10 classes; a new head of 2 classes" in said.err
    assert "skipped in the folder (hidden: 1)" in said.err
    assert "skipped images that cannot be read: 1; the first: " in said.err
    started = files.read(trained / "model.pt")["weights"]["conv1.weight"]
    moved = files.read(out / "model.pt")["weights"]["conv1.weight"] - started
    assert 0 < moved.norm() < 0.1 * started.norm()
    words = ["eval", "imagefolder", str(photos), "--weights", str(out / "model.pt"), "--json"]
    assert cli.main(words) == 2
    capsys.readouterr()
    for split, images in ((None, 19), ("test", 4), ("train", 15)):
        chosen = [] if split is None else ["--split", split]
        assert cli.main([*words, "--on-bad-image", "skip", *chosen]) == 0
        said = capsys.readouterr()
        bad = "cannot be read: 1" in said.err
        assert json.loads(said.out)["images"] == images + (not bad and split == "train")
        assert ("all its images are evaluated" in said.err) == (split is None)


def test_names_cannot_command_the_terminal(trained, pictures, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"\x1b[2J{i}\x07\n" for i in range(10)), encoding="utf-8-sig")
    words = ["predict", str(pictures[0]), "--weights", str(trained / "model.pt")]
    for form in ([], ["--csv"], ["--json"]):
        assert cli.main([*words, "--classes", str(names), *form]) == 0
        said = capsys.readouterr().out
        assert "\x1b" not in said
        assert "\\x1b[2J" in said or "\\u001b[2J" in said
    text = eval_command.text(Evaluation(0.5, 0.5, 1.0, torch.eye(2).long()), ("\x1b[31m", "b"))
    assert "\x1b" not in text
    odd = tmp_path / "\x1b[31mred.png"
    odd.write_bytes(b"no image")
    assert cli.main(["predict", str(odd), "--weights", str(trained / "model.pt")]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_a_full_disk_has_status_1(monkeypatch, tmp_path, capsys):
    def full(*args, **options):
        raise NotWritten(f"{tmp_path}/model.pt: not written: No space left on device")

    monkeypatch.setattr(train_command, "fit", full)
    assert cli.main(["train", "digits", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.endswith("model.pt: not written: No space left on device\n")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), 1, "not enough memory for this size or batch: MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x\nmore"), 1, "can't allocate"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["python", "torch", "ctrl-c"],
)
def test_other_ends_have_a_line(monkeypatch, tmp_path, capsys, error, code, says):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(train_command, "fit", fails)
    assert cli.main(["train", "digits", "--out", str(tmp_path)]) == code
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == bool(says)


@pytest.mark.parametrize("words", ["env", "verify --quick", "predict a --weights b"])
@pytest.mark.parametrize("isa", ["amx_bf16", "sse9"])
def test_an_environment_variable_is_named(words, isa):
    """Also one that is valid on another CPU."""
    if isa in backends.build_info()["isa_detected"]:
        pytest.skip("this CPU has it")
    environment = {**os.environ, "RESNET_FAST_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-m", "resnet_fast", *words.split()], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"resnet-fast {words.split()[0]}: error: RESNET_FAST_CPU_ISA")
    assert done.stderr.count("\n") == 1


def test_a_clock_that_is_set_back_leaves_no_negative_time(capsys):
    row = {**dict.fromkeys(COLUMNS, 1.0), "epoch": 1, "seconds": -5.0}
    train_command._Lines(3, 0).epoch(row)
    assert capsys.readouterr().out.endswith(", 0:00:00 left\n")


def test_a_closed_pipe_has_no_traceback(trained, pictures):
    words = ["predict", *map(str, pictures), "--weights", str(trained / "model.pt")]
    command = [sys.executable, "-m", "resnet_fast", *words, "--batch-size", "1"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.wait() == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


def test_predict_with_names(trained, pictures, tmp_path, capsys):
    words = ["predict", str(pictures[0]), "--weights", str(trained / "model.pt"), "--top", "3"]
    assert cli.main(words) == 0
    own = capsys.readouterr().out.splitlines()
    assert own[0] == str(pictures[0])
    assert len(own) == 4
    names = tmp_path / "names.txt"
    names.write_text("".join(f"digit {i}\n" for i in range(10)))
    assert cli.main([*words, "--classes", str(names)]) == 0
    given = capsys.readouterr().out.splitlines()
    assert given[1:] == [line[:11] + "digit " + line[11:] for line in own[1:]]
    names.write_text("one\n")
    assert cli.main([*words, "--classes", str(names)]) == 2
    assert f"classes: {names} has 1 names" in capsys.readouterr().err


def test_a_digit_from_a_file_is_read(tmp_path, capsys):
    """From a picture as large as a person would give; by a net that knows digits."""
    image = pytest.importorskip("PIL.Image")
    digits = load_data("digits", size=8)
    torch.manual_seed(0)
    net = resnet_fast.create_model("cifar_resnet20")
    recipe = Recipe(epochs=3, batch_size=64, lr=0.05, warmup=1.0, augment="none")
    fit(net, digits, recipe, out=tmp_path, spec=ModelSpec("cifar_resnet20"))
    predicted = evaluate(net, digits).confusion
    right = predicted.diag().argmax().item()
    index = int((digits.test_y == right).nonzero()[0])
    values = (digits.test_x[index, 0].numpy() * 255).round().astype(np.uint8)
    image.fromarray(values).resize((200, 200), image.Resampling.BOX).save(tmp_path / "digit.png")
    with torch.no_grad():
        x = digits.preprocessing.normalize(digits.test_x[index : index + 1])
        wanted = net.eval()(x).argmax().item()
    words = ["predict", str(tmp_path / "digit.png"), "--weights", str(tmp_path / "model.pt")]
    assert cli.main([*words, "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["top"][0]["name"] == str(wanted)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_torchvisions_files_are_recognized(tmp_path, name):
    """By keys and shapes, also those from before `num_batches_tracked`."""
    with torch.device("meta"):
        weights = resnet_fast.create_model(name, num_classes=7).state_dict()
    old = {k: torch.zeros(v.shape) for k, v in weights.items() if "tracked" not in k}
    torch.save(old, tmp_path / "weights.pth", _use_new_zipfile_serialization=name != "resnet18")
    loaded = load_weights(tmp_path / "weights.pth")
    assert (loaded.name, loaded.model.fc.out_features) == (name, 7)
    assert loaded.classes is None
    assert (loaded.preprocessing.size, loaded.preprocessing.resize) == (224, 256)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (lambda: resnet_fast.create_model("cifar_resnet20").state_dict(),
         "are those of cifar_resnet20 and plain_cifar_resnet20; give its name"),
        (lambda: {"fc.weight": torch.zeros(3, 4), "conv1.weight": torch.zeros(4, 3, 3, 3)},
         "are those of no model"),
        (lambda: {"weight": torch.zeros(3)}, "expected a ResNet; it has 'weight', without conv1"),
        (lambda: [torch.zeros(3)], "neither a checkpoint of resnet_fast nor a state dict"),
        (lambda: {}, "neither a checkpoint of resnet_fast nor a state dict"),
    ],
    ids=["ambiguous", "unknown", "other", "list", "empty"],
)  # fmt: skip
def test_weights_that_tell_no_model(tmp_path, weights, says):
    path = tmp_path / "weights.pth"
    torch.save(weights(), path)
    with pytest.raises(ValueError, match=says) as raised:
        load_weights(path)
    assert str(path) in str(raised.value)


def test_a_model_of_another_kind_is_named(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(resnet_fast.create_model("cifar_resnet20").state_dict(), path)
    loaded = load_weights(path, "cifar_resnet20")
    assert loaded.name == "cifar_resnet20"
    with pytest.raises(ValueError, match=f"model: the weights in {path} do not fit resnet18"):
        load_weights(path, "resnet18")
    with pytest.raises(ValueError, match="did you mean"):
        load_weights(path, "resnet-18")


def test_a_resumed_run_needs_no_weights(trained, tmp_path, capsys):
    """Nor its model's name; another name is an error."""
    weights, out = tmp_path / "start.pt", tmp_path / "run"
    shutil.copy(trained / "model.pt", weights)
    words = ["train", "digits", *SHORT, "--out", str(out)]
    assert cli.main([*words, "--weights", str(weights), "--epochs", "1"]) == 0
    weights.unlink()
    assert cli.main([*words, "--epochs", "2", "--resume"]) == 0
    assert "epoch 2/2" in capsys.readouterr().out
    assert cli.main([*words, "--epochs", "3", "--resume", "--model", "resnet18"]) == 2
    assert "has cifar_resnet20, got resnet18" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--freeze", ""], "argument --freeze: expected names with commas, got ''"),
        (["--freeze", "stem,,fc"], "argument --freeze: expected names with commas"),
        (["--milestones", "0.1,x"], "argument --milestones: expected numbers with commas, got"),
        (["--milestones", "0.6,0.3"], "milestones: expected rising shares of all epochs"),
        (["--freeze", "layer9"], "freeze: expected names of modules, such as stem, conv1"),
    ],
)
def test_wrong_lists_are_named(tmp_path, capsys, words, says):
    try:
        code = cli.main(["train", "synthetic", "--size", "8", "--out", str(tmp_path), *words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert says in capsys.readouterr().err
