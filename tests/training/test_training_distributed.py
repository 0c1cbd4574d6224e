"""Two processes on gloo train one net: together what one process does alone."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from training_cases import IMAGES, RECIPE, STEPS, data, model, without_norms
from training_worker import cases

from resnet_fast.training import checkpoint, evaluate, fit
from resnet_fast.training.distributed import World, batches

TESTS = Path(__file__).parents[1] / "support"


def torchrun(*words, timeout=240):
    """`words` in two processes of one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", *map(str, words)]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder in which `training_worker.ranks` has run."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(TESTS / "training_worker.py", "ranks", folder)
    return folder


@pytest.fixture(scope="module")
def ranks(out):
    """What either process did, by the name of the case."""
    return [torch.load(out / f"rank-{i}.pt", weights_only=True) for i in range(2)]


@pytest.mark.parametrize("name", ["without norms", "norms"])
def test_both_end_with_the_same_net(ranks, out, name):
    first, second = (rank[name] for rank in ranks)
    assert list(first["weights"]) == list(second["weights"])
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
    assert first["losses"] == second["losses"]
    assert [row["test_loss"] for row in first["epochs"]] == [
        row["test_loss"] for row in second["epochs"]
    ]


@pytest.mark.parametrize("name", ["without norms", "norms"])
def test_every_image_is_seen_once_an_epoch(ranks, name):
    """Half of each batch a process, as told by the images themselves."""
    recipe = cases()[name][1]
    for epoch in range(recipe.epochs):
        seen = [rank[name]["seen"][epoch * STEPS : (epoch + 1) * STEPS] for rank in ranks]
        assert {len(batch) for rank in seen for batch in rank} == {recipe.batch_size // 2}
        together = torch.cat([batch for rank in seen for batch in rank])
        assert len(together.unique()) == STEPS * recipe.batch_size


def test_two_processes_equal_one(ranks):
    """Where images do not meet: the same weights, losses and figures, up to rounding in double."""
    name = "without norms"
    net, recipe = cases()[name]
    history = fit(net, data(), recipe)
    found = ranks[0][name]
    assert found["losses"] == pytest.approx(history.losses, rel=1e-6)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(found["weights"][key], value, rtol=1e-12, atol=1e-14)
    for ours, alone in zip(found["epochs"], history.epochs, strict=True):
        for column in ("lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            assert ours[column] == pytest.approx(alone[column], rel=1e-6), column


def test_loaders_of_two_processes_equal_the_data_set(ranks):
    """Without augmentation; loaders of different lengths are an error."""
    found = [rank["loader"] for rank in ranks]
    net = without_norms()
    alone = fit(net, data(), replace(RECIPE, augment="none")).losses
    for one in found:
        assert one["losses"] == pytest.approx(alone)
        assert one["unequal"] == "data: expected equally many batches in every process"
        for key, value in net.state_dict().items():
            torch.testing.assert_close(one["weights"][key], value)


def test_a_signal_to_one_process_stops_both(ranks, out):
    """After the same step; what goes on from there ends bit by bit as without it."""
    first, second = (rank["interrupted"] for rank in ranks)
    assert Path(first["path"]).name == "epoch-0001-step-000002.pt"
    assert list(first["weights"]) == list(second["weights"])
    for rank in ranks:
        found, whole = rank["interrupted"], rank["norms"]
        assert found["losses"] == whole["losses"]
        for key, value in whole["weights"].items():
            assert torch.equal(found["weights"][key], value), key
    kept, whole = (checkpoint.read(out / name / "model.pt") for name in ("interrupted", "norms"))
    for key, value in whole["weights"].items():
        assert torch.equal(kept["weights"][key], value), key


def test_the_test_counts_every_image_once(ranks, out):
    """31 images on two processes; what is kept is the first one's average and statistics."""
    content = checkpoint.read(out / "norms" / "model.pt")
    net = model(dtype=torch.float64)
    net.load_state_dict(content["weights"])
    found = evaluate(net, data())
    last = ranks[0]["norms"]["epochs"][-1]
    assert last["test_loss"] == pytest.approx(found.loss)
    assert last["test_accuracy"] == found.accuracy
    assert found.confusion.sum() == IMAGES["test"]


def test_a_run_of_two_goes_on_in_two(out):
    path = out / "norms" / "checkpoints" / "epoch-0003.pt"
    content = checkpoint.read(path)
    assert len(content["training"]["random"]) == 2
    net, recipe = cases()["norms"]
    with pytest.raises(ValueError, match="expected 2 processes, as in the checkpoint, got 1"):
        fit(net, data(), recipe, out=out / "norms", resume=True)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_shares_of_an_epoch(size):
    """Disjoint, of equal length, together the batches of one process; anew every epoch."""
    alone = batches(100, 24, 5, 2, World(0, 1))
    assert [len(batch) for batch in alone] == [24] * 4
    shares = [batches(100, 24, 5, 2, World(rank, size)) for rank in range(size)]
    for i, whole in enumerate(alone):
        parts = [share[i] for share in shares]
        assert {len(part) for part in parts} == {24 // size}
        assert torch.equal(torch.stack(parts, 1).flatten(), whole)
    other = batches(100, 24, 5, 3, World(0, 1))
    assert not torch.equal(other[0], alone[0])
    assert not torch.equal(batches(100, 24, 6, 2, World(0, 1))[0], alone[0])


def test_a_batch_that_cannot_be_shared_is_named(monkeypatch):
    monkeypatch.setattr("resnet_fast.training.loop.world", lambda: World(0, 5))
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple of 5 \(5 processes"):
        fit(model(), data(), RECIPE)


def sync_refusal():
    """Why fused blocks cannot run nn.SyncBatchNorm here, or None."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(model())
    try:
        net(torch.randn(4, 3, 8, 8))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


@pytest.mark.slow
def test_two_processes_with_sync_bn_equal_one(tmp_path):
    """Batch statistics of the whole batch: weights, running statistics and losses."""
    why = sync_refusal()
    if why is not None:
        pytest.skip(f"fused blocks do not synchronize here: {why}")
    torchrun(TESTS / "training_worker.py", "synchronized", tmp_path)
    found = torch.load(tmp_path / "rank-0.pt", weights_only=True)["synchronized"]
    net, recipe = cases()["synchronized"]
    history = fit(net, data(), replace(recipe, sync_bn=False))
    assert found["losses"] == pytest.approx(history.losses, rel=1e-6)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(found["weights"][key], value, rtol=1e-9, atol=1e-11)
