"""Well-formed checkpoints of wrong content are refused by name, before anything is loaded."""

import copy
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_cases import RECIPE, STEPS, assert_same, data, model

from resnet_fast.runtime.files import InUse, NotWritten, locked, replacing
from resnet_fast.training import checkpoint as files
from resnet_fast.training import fit
from resnet_fast.training.checkpoint import CheckpointError
from resnet_fast.training.loop import LOCK
from resnet_fast.training.optimizers import optimizer_of
from resnet_fast.training.state import State

ENDLESS = [1]
for _ in range(64):
    ENDLESS = [ENDLESS, ENDLESS]

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and the content of the checkpoint before the last."""
    out = tmp_path_factory.mktemp("run")
    fit(model(), data(), RECIPE, out=out)
    return out, files.read(out / "checkpoints" / "epoch-0002.pt")


def put(content, path, value):
    *parents, last = path
    for name in parents:
        content = content[name]
    if value is DELETED:
        del content[last]
    else:
        content[last] = value


DELETED = object()
T, O = "training", "optimizer"  # noqa: E741
CASES = [
    (("recipe",), 5, "recipe: expected a dict"),
    (("recipe", "lr"), torch.ones(3), "has lr tensor([1., 1., 1.]), this run has 0.05"),
    (("recipe", "lr"), ENDLESS, "has lr a list, this run has 0.05"),
    (("data",), ["bands"], "has data ['bands'], this run has 'bands'"),
    ((T,), 7, "training: expected a dict, got 7"),
    ((T, "epoch"), DELETED, "training: has no 'epoch'"),
    ((T, "extra"), 1, "training: has an unknown 'extra'"),
    ((T, "epoch"), 10**9, "training: epoch: expected 0 to 1000000, got 1000000000"),
    ((T, "epoch"), -1, "training: epoch: expected 0 to 1000000, got -1"),
    ((T, "epoch"), 2.0, "training: epoch: expected an integer, got 2.0"),
    ((T, "epoch"), True, "training: epoch: expected an integer, got True"),
    ((T, "epoch"), 10**30, "training: epoch: expected 0 to 1000000, got 1000"),
    ((T, "epoch"), 1, "training: schedule: expected 4 to 4, got 8"),
    ((T, "step"), 5, "training: step: expected 0 to 4, got 5"),
    ((T, "step"), "1", "training: step: expected an integer, got '1'"),
    ((T, "tally"), torch.zeros(2, 2), "training: tally: expected a tensor [4, 3]"),
    ((T, "tally"), torch.zeros(4, 3, dtype=torch.float64, device="meta"), "training: tally"),
    ((T, "tally"), torch.zeros(4, 3, dtype=torch.float64).to_sparse(), "training: tally"),
    ((T, "history"), [], "training: history: expected a dict, got []"),
    ((T, "history", "losses"), [0.5], "training: history: losses: expected a list of 8 values"),
    ((T, "history", "losses"), ["a"] * 8, "training: history: losses: expected a number, got 'a'"),
    ((T, "history", "epochs", 0), {"epoch": 1}, "training: history: epochs: has no 'lr'"),
    ((T, "generator"), torch.zeros(3, dtype=torch.uint8), "training: generator: expected a tensor"),
    ((T, "generator"), torch.full((5056,), 255, dtype=torch.uint8), "training: generator: "),
    ((T, "random"), 5, "training: random: expected a list, got 5"),
    ((T, "random"), [[]], "training: random: expected states, got []"),
    ((T, "random"), [[torch.zeros(2)]], "training: random: expected a tensor"),
    ((T, "model"), {}, "training: model: has no 'conv1.weight'"),
    ((T, "model", "fc.bias"), torch.zeros(()), "training: model: fc.bias: expected a tensor [4]"),
    ((T, "model", "fc.bias"), torch.zeros(4).double(), "training: model: fc.bias: expected"),
    ((T, "model", "other"), torch.zeros(4), "training: model: has an unknown 'other'"),
    ((T, "schedule"), None, "training: schedule: expected a dict, got None"),
    ((T, "schedule", "base_lrs"), [], "training: schedule: base_lrs: expected a list of 1"),
    ((T, "schedule", "last_epoch"), "x", "training: schedule: last_epoch: expected an integer"),
    ((T, "scaler"), {"scale": 0}, "training: scaler: has an unknown 'scale'"),
    ((T, "averaged"), {}, "training: averaged: expected a value like None, got {}"),
    ((T, O), {}, "training: optimizer: has no 'state'"),
    ((T, O, "param_groups"), [], "training: optimizer: expected a list of 1 values, got 0"),
    ((T, O, "param_groups", 0, "lr"), "x", "training: optimizer: lr: expected a number, got 'x'"),
    ((T, O, "param_groups", 0, "params"), [0], "training: optimizer: params: expected a list of"),
    ((T, O, "param_groups", 0, "params", 0), 1, "its parameters are not those of the model"),
    ((T, O, "state"), [], "training: optimizer: expected a dict, got []"),
    ((T, O, "state", 99), {"momentum_buffer": None}, "training: optimizer: expected 0 to"),
    ((T, O, "state", "a"), {"momentum_buffer": None}, "training: optimizer: expected an integer"),
    ((T, O, "state", 0), {}, "training: optimizer: 0: has no 'momentum_buffer'"),
    ((T, "model", "fc.bias"), torch.nested.nested_tensor([torch.zeros(2)]), "one that is not"),
    ((T, O, "state", 0, "momentum_buffer"), torch.zeros(1),
     "training: optimizer: 0: 'momentum_buffer': expected a te"),
    ((T, "schedule", "last_epoch"), -5, "training: schedule: expected 8 to 8, got -5"),
    ((T, "schedule", "base_lrs", 0), 99.0, "resume: the optimizer of the checkpoint has lr [99.0]"),
    ((T, O, "param_groups", 0, "weight_decay"), 0.5, "has weight_decay 0.5, this run has 0.0005"),
    ((T, O, "param_groups", 0, "maximize"), True, "has maximize True, this run has False"),
    ((T, "epoch"), 4, "epochs: expected at least the 4 complete epochs of the checkpoint, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "says"), CASES, ids=["-".join(map(str, case[0])) for case in CASES]
)
def test_wrong_content_is_named(run, tmp_path, path, value, says):
    content = copy.deepcopy(run[1])
    put(content, path, value)
    file = tmp_path / "epoch-0002.pt"
    files.write(file, content)
    net = model()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError) as raised:
        fit(net, data(), RECIPE, out=tmp_path / "out", resume=file)
    assert says in str(raised.value)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert_same(net.state_dict(), before)


@pytest.mark.parametrize(
    ("name", "slot", "value", "says"),
    [
        ("adamw", "step", torch.tensor(-1.0), "'step': expected a number of steps, got -1.0"),
        ("adamw", "step", torch.tensor(math.nan), "'step': expected a number of steps, got nan"),
        ("adamw", "step", 3, "'step': expected a tensor, got 3"),
        ("adamw", "exp_avg", None, "'exp_avg': expected a tensor, got None"),
        ("adamw", "exp_avg_sq", torch.zeros(2), "'exp_avg_sq': expected a tensor"),
        ("muon", "momentum_buffer", None, "'momentum_buffer': expected a tensor, got None"),
        ("muon", "momentum_buffer", torch.zeros(8, 3, 3, 3), "expected a tensor [8, 27]"),
        ("lars", "momentum_buffer", torch.zeros(8, 3).half(), "expected a tensor [8, 3, 3, 3]"),
    ],
)
def test_wrong_slots_are_named(tmp_path, name, slot, value, says):
    """Of the first filters; nothing is loaded."""
    recipe = replace(RECIPE, optimizer=name, lr=0.01)
    fit(model(), data(), replace(recipe, epochs=1, warmup=1.0), out=tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "epoch-0001.pt"
    content = files.read(file)
    content[T][O]["state"][0][slot] = value
    files.write(tmp_path / "epoch-0001.pt", content)
    net = model()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CheckpointError) as raised:
        fit(net, data(), recipe, out=tmp_path / "out", resume=tmp_path / "epoch-0001.pt")
    assert says in str(raised.value)
    assert_same(net.state_dict(), before)


def test_momentum_that_shares_memory_goes_on(run, tmp_path):
    """SGD writes to it."""
    content = copy.deepcopy(run[1])
    slot = content["training"]["optimizer"]["state"][0]
    slot["momentum_buffer"] = slot["momentum_buffer"].flatten()[:1].expand(
        slot["momentum_buffer"].shape
    )
    files.write(tmp_path / "epoch-0002.pt", content)
    fit(model(), data(), RECIPE, out=tmp_path / "out", resume=tmp_path / "epoch-0002.pt")


def test_the_unchanged_content_goes_on(run, tmp_path):
    files.write(tmp_path / "epoch-0002.pt", run[1])
    history = fit(model(), data(), RECIPE, out=tmp_path, resume=tmp_path / "epoch-0002.pt")
    assert len(history.epochs) == 3


def test_entries_of_another_pytorch_are_passed_over(run, tmp_path):
    """Its scheduler may store more, or less."""
    content = copy.deepcopy(run[1])
    content["training"]["schedule"].update(step="harm", verbose=False)
    content["training"]["optimizer"]["param_groups"][0]["decoupled"] = False
    del content["training"]["optimizer"]["param_groups"][0]["foreach"]
    files.write(tmp_path / "epoch-0002.pt", content)
    fit(model(), data(), RECIPE, out=tmp_path / "out", resume=tmp_path / "epoch-0002.pt")
    wanted = files.read(run[0] / "model.pt")["weights"]
    assert_same(files.read(tmp_path / "out" / "model.pt")["weights"], wanted)


# A process whose files may have at most so many bytes: what a full disk is like.
FULL = """
import resource, signal, sys
from pathlib import Path
from training_cases import RECIPE, data, model
from resnet_fast.training import fit
from resnet_fast.runtime.files import NotWritten
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
out = Path(sys.argv[1])

def limit(row):
    if row["epoch"] == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

try:
    fit(model(), data(), RECIPE, out=out, callbacks={"epoch": limit})
except NotWritten as error:
    print(error)
"""


def test_a_full_disk_is_named_and_the_checkpoint_before_stays(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": f"{SUPPORT}:{SUPPORT.parents[1]}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    last = tmp_path / "checkpoints" / "epoch-0003.pt"
    assert done.stdout.strip() == f"{last}: not written: File too large"
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["best-epoch-0002.pt", "epoch-0001.pt", "epoch-0002.pt"]
    history = fit(model(), data(), RECIPE, out=tmp_path, resume=True)
    assert len(history.epochs) == 3


def test_two_runs_do_not_share_a_folder(tmp_path):
    """The second is refused with the process of the first, also while it only starts."""
    code = (
        "import sys; from pathlib import Path; from resnet_fast.runtime.files import locked\n"
        "with locked(Path(sys.argv[1]), wait=False):\n    print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / LOCK)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={"PYTHONPATH": str(SUPPORT.parents[1])},
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        says = f"^out: {tmp_path} is in use by process {other.pid}; choose another"
        with pytest.raises(ValueError, match=says):
            fit(model(), data(), RECIPE, out=tmp_path)
        assert not (tmp_path / "checkpoints").exists()
        other.kill()
    fit(model(), data(), RECIPE, out=tmp_path)  # a lock ends with its process


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(NotWritten, match=r"file/out/\.lock: not written: Not a directory"):
        fit(model(), data(), RECIPE, out=tmp_path / "file" / "out")


def test_a_planted_link_is_not_followed(tmp_path):
    """Neither in place of the lock nor of a part."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(victim)
    with pytest.raises(NotWritten, match="not written"):
        fit(model(), data(), RECIPE, out=tmp_path / "out")
    (tmp_path / ".a.txt.part").symlink_to(victim)
    with replacing(tmp_path / "a.txt", "w") as file:
        file.write("new")
    assert victim.read_text() == "mine"
    assert (tmp_path / "a.txt").read_text() == "new"


def test_what_fails_leaves_no_part(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path, "w") as file:
        file.write("new")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_parts_of_a_killed_run_are_removed(tmp_path):
    for folder in (tmp_path, tmp_path / "checkpoints"):
        folder.mkdir(exist_ok=True)
        (folder / ".model.pt.0123456789abcdef.part").write_bytes(b"torn")
    (tmp_path / ".film.mkv.part").write_bytes(b"a download")
    fit(model(), data(), RECIPE, out=tmp_path)
    assert [path.name for path in tmp_path.rglob("*.part")] == [".film.mkv.part"]


def test_a_lock_ends_with_its_process_not_with_its_workers(tmp_path):
    """A forked process does not keep it, as a worker of a killed run would."""
    ready, started = os.pipe()
    with locked(tmp_path / "lock", wait=False):
        child = os.fork()
        if not child:
            os.write(started, b"1")
            signal.pause()
        os.read(ready, 1)
    try:
        with locked(tmp_path / "lock", wait=False):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_pipe_is_written_not_replaced(tmp_path):
    """Such as /dev/stdout, or a process of the shell."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with replacing(tmp_path / "pipe", "w") as file:
        file.write("text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)


def test_the_generator_of_another_device_is_checked_by_itself(run, monkeypatch):
    """A GPU's has 16 bytes of state, the CPU's 5056."""

    class Small:
        def __init__(self, device="cpu"):
            self.device, self.state = torch.device("meta"), torch.zeros(16, dtype=torch.uint8)

        def manual_seed(self, seed):
            return self

        def get_state(self):
            return self.state

        def set_state(self, state):
            if len(state) != 16:
                raise RuntimeError("RNG state is wrong size")

    net = model()
    state = State(net, RECIPE, STEPS, torch.device("cpu"), optimizer_of(net, RECIPE))
    state.generator = Small()
    saved = state.state_dict()
    generator = torch.Generator
    monkeypatch.setattr(
        torch, "Generator", lambda device: Small() if device.type == "meta" else generator(device)
    )
    state.load_state_dict(saved)
    saved["random"] = [[torch.zeros(16, dtype=torch.uint8)]]
    with pytest.raises(CheckpointError, match="training: random: expected a tensor"):
        state.load_state_dict(saved)


def test_a_lock_in_this_process(tmp_path):
    with locked(tmp_path / "lock", wait=False), pytest.raises(InUse, match="in use by process"):
        with locked(tmp_path / "lock", wait=False):
            pass
    with locked(tmp_path / "lock", wait=False):
        pass
