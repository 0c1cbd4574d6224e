"""A run that was interrupted, by whatever, ends as one that was not: bit by bit."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_cases import RECIPE, STEPS, assert_same, data, metrics, model
from training_worker import SAVED

from resnet_fast.training import Evaluation, Interrupted, fit
from resnet_fast.training import checkpoint as files
from resnet_fast.training.checkpoint import CheckpointError
from resnet_fast.training.loop import _Run
from resnet_fast.training.recipe import lr_factor

TESTS = Path(__file__).parents[1] / "support"
RECIPES = {
    "plain": RECIPE,
    "everything": replace(RECIPE, ema=0.9, precision="fp16", accumulate=2, clip=1.0,
                          label_smoothing=0.1, decay_norms=False, checkpointing=True),
}  # fmt: skip


def content(out, name="epoch-0003.pt"):
    return files.read(out / "checkpoints" / name)


def test_resumes_what_was_written_before_there_was_an_interpolation(tmp_path):
    wanted = fit(model(), data(), RECIPE, out=tmp_path / "whole")
    path = tmp_path / "whole" / "checkpoints" / "epoch-0002.pt"
    old = torch.load(path, weights_only=True)
    assert old["preprocessing"].pop("interpolation") == "bilinear"
    files.write(tmp_path / "old.pt", old)
    found = fit(model(), data(), RECIPE, out=tmp_path / "rest", resume=tmp_path / "old.pt")
    assert metrics(found) == metrics(wanted)
    other = replace(data(), preprocessing=replace(data().preprocessing, interpolation="bicubic"))
    with pytest.raises(ValueError, match=r"has preprocessing .*, this run has"):
        fit(model(), other, RECIPE, out=tmp_path / "other", resume=tmp_path / "old.pt")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("step", [STEPS + 2, 2 * STEPS], ids=["within", "at the end"])
def test_resumed_equals_uninterrupted(tmp_path, stop_at, recipe, step):
    """Model, optimizer, schedule, scaler, average, generators and metrics; dropout's too."""
    whole = model(dropout=0.2)
    torch.manual_seed(7)
    wanted = fit(whole, data(), recipe, out=tmp_path / "whole")
    stop_at(step)
    cut = model(dropout=0.2)
    torch.manual_seed(7)
    with pytest.raises(Interrupted, match="SIGTERM") as raised:
        fit(cut, data(), recipe, out=tmp_path / "parts")
    name = files.name_of((step - 1) // STEPS, step - (step - 1) // STEPS * STEPS)
    assert raised.value.path == tmp_path / "parts" / "checkpoints" / name
    assert raised.value.path.exists()
    rest = model(dropout=0.2)
    torch.manual_seed(8)
    found = fit(rest, data(), recipe, out=tmp_path / "parts", resume=True)
    assert metrics(found) == metrics(wanted)
    assert found.losses == wanted.losses
    assert_same(rest.state_dict(), whole.state_dict())
    for name in ("epoch-0002.pt", "epoch-0003.pt"):
        assert_same(content(tmp_path / "parts", name), content(tmp_path / "whole", name))
    assert_same(files.read(tmp_path / "parts" / "model.pt"),
                files.read(tmp_path / "whole" / "model.pt"))  # fmt: skip
    state = content(tmp_path / "whole")["training"]
    assert set(state) >= {"model", "optimizer", "schedule", "scaler", "averaged", "generator",
                          "random", "history"}  # fmt: skip
    assert bool(state["scaler"]) == (recipe.precision == "fp16")


def test_the_average_and_the_scaler_are_kept(tmp_path):
    """What the equality above speaks of is there: it is no equality of nothing."""
    fit(model(), data(), RECIPES["everything"], out=tmp_path)
    state = content(tmp_path)["training"]
    assert state["averaged"]["n_averaged"] == 3 * STEPS
    assert state["scaler"]["scale"] > 0
    assert state["schedule"]["last_epoch"] == 3 * STEPS
    buffers = [slot["momentum_buffer"] for slot in state["optimizer"]["state"].values()]
    assert buffers
    assert all(buffer.any() for buffer in buffers)


def test_a_run_may_be_interrupted_again_and_again(tmp_path, stop_at):
    wanted = fit(model(), data(), RECIPE)
    for _ in range(3 * STEPS // 2):
        stop_at(2)
        with pytest.raises(Interrupted):
            fit(model(), data(), RECIPE, out=tmp_path, resume=True)
    stop_at(0)
    found = fit(model(), data(), RECIPE, out=tmp_path, resume=True)
    assert metrics(found) == metrics(wanted)
    assert found.losses == wanted.losses


def test_ctrl_c_stops_as_well(tmp_path, stop_at):
    stop_at(1, signal.SIGINT)
    with pytest.raises(Interrupted, match="SIGINT"):
        fit(model(), data(), RECIPE, out=tmp_path)
    assert [p.name for p in files.checkpoints(tmp_path / "checkpoints")] == [
        "epoch-0000-step-000001.pt"
    ]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as before


def test_without_a_folder_signals_are_left_alone(stop_at):
    stop_at(2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(model(), data(), RECIPE)


def worker(*words):
    """A process that trains and says so, step by step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parents[1])}
    command = [sys.executable, str(TESTS / "training_worker.py"), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted, with as many threads as the worker has."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    net = model(dropout=0.2)
    fit(net, data(), SAVED, out=out)
    yield out
    torch.set_num_threads(2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "kind", "left"),
    [
        (STEPS + 2, "step", ["epoch-0001.pt"]),
        (3, "write", ["epoch-0001.pt", "epoch-0002.pt"]),
    ],
    ids=["in a step", "while writing"],
)
def test_kill_9_loses_at_most_the_running_epoch(tmp_path, whole, last, kind, left):
    """And no checkpoint, also while one is written; what goes on from it ends the same."""
    process = worker("train", tmp_path, last, kind)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in files.checkpoints(tmp_path / "checkpoints")] == left
    for name in left:
        content(tmp_path, name)
    fit(model(dropout=0.2), data(), SAVED, out=tmp_path, resume=True)
    for name in ("epoch-0002.pt", "epoch-0003.pt"):
        assert_same(content(tmp_path, name), content(whole, name))
    assert not list((tmp_path / "checkpoints").glob(".*"))  # no torn file stays


@pytest.mark.slow
def test_sigterm_to_a_process(tmp_path, whole):
    """From outside, within an epoch; not one step is lost."""
    process = worker("train", tmp_path, STEPS + 1, "wait")
    for line in process.stdout:
        if line == f"step {STEPS + 1}\n":
            process.send_signal(signal.SIGTERM)
            break
    assert process.communicate(timeout=120)[0] == ""  # no further step
    assert process.returncode == 1  # Interrupted
    names = [path.name for path in files.checkpoints(tmp_path / "checkpoints")]
    assert names == ["epoch-0001.pt", "epoch-0001-step-000001.pt"]
    fit(model(dropout=0.2), data(), SAVED, out=tmp_path, resume=True)
    assert_same(content(tmp_path), content(whole))


@pytest.fixture
def out(tmp_path):
    """The folder of a finished run."""
    fit(model(), data(), RECIPE, out=tmp_path)
    return tmp_path


def test_the_last_two_are_kept(out):
    names = [path.name for path in files.checkpoints(out / "checkpoints")]
    assert names == ["epoch-0002.pt", "epoch-0003.pt"]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99], ids=["empty", "half", "almost whole"])
def test_a_truncated_checkpoint_is_refused_and_the_one_before_it_offered(out, share):
    last, before = (out / "checkpoints" / f"epoch-000{i}.pt" for i in (3, 2))
    whole = last.read_bytes()
    last.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError) as raised:
        fit(model(), data(), RECIPE, out=out, resume=True)
    assert str(raised.value).startswith(f"{last}: damaged, or not a checkpoint: ")
    assert str(raised.value).endswith(f"to continue from the one before it: --resume {before}")
    fit(model(), data(), RECIPE, out=out, resume=before)
    assert last.read_bytes() != whole  # its times are others
    history = content(out)["training"]["history"]
    assert len(history["epochs"]) == 3
    assert len(history["losses"]) == 3 * STEPS


def test_a_changed_byte_is_seen(out):
    last = out / "checkpoints" / "epoch-0003.pt"
    changed = bytearray(last.read_bytes())
    weights = content(out)["weights"]["fc.weight"]
    at = changed.find(weights.numpy().tobytes())
    assert at > 0
    changed[at] ^= 1
    last.write_bytes(bytes(changed))
    with pytest.raises(CheckpointError, match=f"{last}: damaged, or not a checkpoint"):
        files.read(last)


def test_the_only_checkpoint_has_none_before_it(out):
    (out / "checkpoints" / "epoch-0002.pt").unlink()
    (out / "checkpoints" / "epoch-0003.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="no earlier one is left"):
        fit(model(), data(), RECIPE, out=out, resume=True)


def test_a_checkpoint_runs_no_code(tmp_path):
    """A pickle that would make a file is refused before it does."""

    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    torch.save({"format": files.FORMAT, "weights": Harm()}, tmp_path / "epoch-0001.pt")
    with pytest.raises(CheckpointError, match=r"epoch-0001\.pt"):
        files.read(tmp_path / "epoch-0001.pt")
    assert not (tmp_path / "harm").exists()


def test_going_on_from_an_earlier_one_replaces_what_came_after(out):
    """A broken later file does not push out the good ones."""
    (out / "checkpoints" / "epoch-0002-step-000003.pt").write_bytes(b"broken")
    before = out / "checkpoints" / "epoch-0002.pt"
    fit(model(), data(), RECIPE, out=out, resume=before)
    names = [path.name for path in files.checkpoints(out / "checkpoints")]
    assert names == ["epoch-0002.pt", "epoch-0003.pt"]


def test_nothing_is_trained_when_all_is_done(out, monkeypatch):
    before = content(out)
    monkeypatch.setattr(_Run, "step", lambda *a: pytest.fail("a step"))
    history = fit(model(), data(), RECIPE, out=out, resume=True)
    assert len(history.epochs) == 3
    assert_same(content(out), before)


def test_resume_starts_where_there_is_nothing(tmp_path):
    history = fit(model(), data(), RECIPE, out=tmp_path / "new", resume=True)
    assert [row["epoch"] for row in history.epochs] == [1, 2, 3]


def test_another_run_is_not_overwritten(out):
    with pytest.raises(ValueError, match=f"out: {out} has files of another run"):
        fit(model(), data(), RECIPE, out=out)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda out: (data(), replace(RECIPE, lr=0.2), True), "has lr 0.05, this run has 0.2"),
        (lambda out: (replace(data(), name="digits"), RECIPE, True), "has data 'bands'"),
        (lambda out: (data(), RECIPE, out / "model.pt"), "resume: .*model.pt has only a model"),
        (lambda out: (data(), RECIPE, out / "none.pt"), "none.pt: no such file"),
        (lambda out: (data(), RECIPE, out / "metrics.csv"), "metrics.csv: damaged, or not"),
    ],
    ids=["recipe", "data", "model", "missing", "other"],
)
def test_what_does_not_fit_is_named(out, make, says):
    bands, recipe, resume = make(out)
    with pytest.raises(ValueError, match=says):
        fit(model(), bands, recipe, out=out, resume=resume)


def test_another_number_of_processes_is_refused(out):
    path = out / "checkpoints" / "epoch-0003.pt"
    changed = files.read(path)
    changed["training"]["random"] *= 2
    files.write(path, changed)
    with pytest.raises(ValueError, match="resume: expected 2 processes, as in the checkpoint"):
        fit(model(), data(), RECIPE, out=out, resume=path)


def test_epochs_sort_by_number(tmp_path):
    names = ["epoch-10000.pt", "epoch-0002.pt", "epoch-0002-step-000010.pt", "epoch-0010.pt"]
    for name in (*names, "epoch-2.pt.part", "model.pt", "epoch-x.pt"):
        (tmp_path / name).touch()
    order = [names[1], names[2], names[3], names[0]]
    assert [path.name for path in files.checkpoints(tmp_path)] == order
    assert files.name_of(2, 10) == names[2]
    assert files.name_of(10, 0) == names[3]


def _accuracies(monkeypatch, *values):
    """The tests of the following epochs find these accuracies."""
    found = iter(values)
    monkeypatch.setattr(
        "resnet_fast.training.feeds.evaluate",
        lambda *_, **__: Evaluation(0.0, next(found), 0.0, torch.zeros(4, 4)),
    )


@pytest.mark.parametrize("links", [True, False])
def test_the_best_is_kept_beside_the_last_two(tmp_path, monkeypatch, links):
    """The first of equals; a copy where the file system has no hard links."""
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError()))
    _accuracies(monkeypatch, 0.5, 0.9, 0.9, 0.7, 0.8)
    weights = []
    net = model()
    fit(net, data(), replace(RECIPE, epochs=5), out=tmp_path,
        callbacks={"epoch": lambda _: weights.append(net.fc.weight.detach().clone())})  # fmt: skip
    folder = tmp_path / "checkpoints"
    names = ["best-epoch-0002.pt", "epoch-0004.pt", "epoch-0005.pt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    best = content(tmp_path, names[0])
    assert torch.equal(best["weights"]["fc.weight"], weights[1])
    assert best["training"]["epoch"] == 2
    # From there on it is another run, and a better epoch takes its place.
    _accuracies(monkeypatch, 0.1, 0.95, 0.2)
    fit(model(), data(), replace(RECIPE, epochs=5), out=tmp_path, resume=folder / names[0])
    names = ["best-epoch-0004.pt", "epoch-0004.pt", "epoch-0005.pt"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_a_best_of_a_future_that_was_left_is_removed(tmp_path, monkeypatch):
    _accuracies(monkeypatch, 0.5, 0.6, 0.9)
    fit(model(), data(), RECIPE, out=tmp_path)
    _accuracies(monkeypatch, 0.4)
    fit(model(), data(), RECIPE, out=tmp_path, resume=tmp_path / "checkpoints" / "epoch-0002.pt")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best-epoch-0002.pt", "epoch-0002.pt", "epoch-0003.pt"]


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_more_epochs_than_before(tmp_path, schedule):
    """Those that are done stay; the rest follows the schedule of the new number."""
    short, long = (replace(RECIPE, epochs=n, schedule=schedule, warmup=0.5) for n in (3, 6))
    done, rates = fit(model(), data(), short, out=tmp_path), []
    history = fit(model(), data(), replace(long, warmup=1.0), out=tmp_path, resume=True,
                  callbacks={"step": lambda event: rates.append(event["lr"])})  # fmt: skip
    assert history.losses[: 3 * STEPS] == done.losses
    assert metrics(history)[:3] == metrics(done)
    assert len(history.epochs) == 6
    wanted = [RECIPE.lr * lr_factor(replace(long, warmup=1.0), i, STEPS) for i in range(6 * STEPS)]
    assert rates == pytest.approx(wanted[3 * STEPS :])
    assert fit(model(), data(), long, out=tmp_path, resume=True).losses == history.losses


def test_fewer_epochs_than_are_done_is_an_error(out):
    with pytest.raises(ValueError, match="epochs: expected at least the 3 complete epochs of the"):
        fit(model(), data(), replace(RECIPE, epochs=2), out=out, resume=True)


@pytest.mark.parametrize("inside", [True, False])
def test_a_best_that_was_not_marked_in_time_is_marked(tmp_path, monkeypatch, inside):
    """The process died between the checkpoint and its second name; or the run goes elsewhere."""
    _accuracies(monkeypatch, 0.5, 0.6)
    fit(model(), data(), replace(RECIPE, epochs=2), out=tmp_path / "a")
    folder = tmp_path / "a" / "checkpoints"
    (folder / "best-epoch-0002.pt").unlink()
    _accuracies(monkeypatch, 0.1)
    out = tmp_path / ("a" if inside else "b")
    resume = True if inside else folder / "epoch-0002.pt"
    fit(model(), data(), RECIPE, out=out, resume=resume)
    best = content(out, "best-epoch-0002.pt")
    assert best["training"]["epoch"] == 2


def test_a_checkpoint_of_another_run_does_not_replace_this_one(tmp_path):
    for name, seed in (("a", 3), ("b", 4)):
        fit(model(), data(), replace(RECIPE, seed=seed), out=tmp_path / name)
    before = sorted((tmp_path / "b").rglob("*"))
    with pytest.raises(ValueError, match=r"out: .*b has files of another run"):
        fit(model(), data(), RECIPE, out=tmp_path / "b",
            resume=tmp_path / "a" / "checkpoints" / "epoch-0002.pt")  # fmt: skip
    assert sorted((tmp_path / "b").rglob("*")) == before
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    with pytest.raises(ValueError, match=r"out: .*b has files of another run"):  # its model.pt
        fit(model(), data(), RECIPE, out=tmp_path / "b")
