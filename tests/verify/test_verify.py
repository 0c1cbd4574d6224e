"""`resnet-fast verify`: right implementations pass, every kind of wrong one is named and fails."""

import json

import pytest
import torch
from torch import nn

from resnet_fast import blocks, cli, functional, models, modules, verify
from resnet_fast.dispatch import backends, ops
from resnet_fast.spec.dtypes import BY_NAME
from resnet_fast.verify import report
from resnet_fast.verify.check import LAYOUTS, Runs, Setting, Trial
from resnet_fast.verify.settle import BAND, settle


def failures(block):
    """The failed checks of one kind of block, in fp32 by the reference implementation."""
    trials = verify.trials(["reference"], dtypes=["fp32"], parts=["blocks"])
    checks = verify.verify([trial for trial in trials if trial.what == block])
    assert checks
    return [check for check in checks if not check.ok]


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("part", ["ops", "blocks"])
@pytest.mark.leave_out(
    cases=lambda case: (case.part, case.dtype) == ("blocks", "fp64") and case.impl.interpreted
)
def test_every_case_passes(impl, dtype, part):
    impl.need(BY_NAME[dtype])
    quick = impl.name != "native" or impl.interpreted  # test_ops and test_modules have all
    trials = verify.trials([impl.name], [impl.device], [dtype], parts=[part], quick=quick)
    checks = verify.verify(list(trials))
    assert {check.setting.layout for check in checks} == set(LAYOUTS)
    assert not [report.failure(check) for check in checks if not check.ok]


@pytest.mark.slow
@pytest.mark.leave_out(cases=lambda case: case.impl.interpreted or case.impl.name == "reference")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["cifar_resnet20", "preact_resnet18"])
def test_whole_models_pass(impl, dtype, name):
    impl.need(BY_NAME[dtype])
    trials = verify.trials([impl.name], [impl.device], [dtype], parts=["models"], names=[name])
    checks = verify.verify(list(trials))
    assert not [report.failure(check) for check in checks if not check.ok]
    parameters = sum(1 for _ in models.create_model(name, fused=False).parameters())
    gradients = [check for check in checks if check.tensor.startswith("grad ")]
    assert len(gradients) == len(LAYOUTS) * (parameters + 1)


def test_the_machines_settings_are_put_back(monkeypatch):
    """Cases run in fp32 proper and on the CPU's draws; afterwards all is as it was."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    class Case:
        def run(self):
            seen.append((torch.backends.cudnn.allow_tf32, torch.empty(1).device.type))
            raise KeyboardInterrupt

    with torch.device("meta"), pytest.raises(KeyboardInterrupt):
        verify.verify([Case()])
    assert seen == [(False, "cpu")] and torch.backends.cudnn.allow_tf32


def test_every_op_and_every_block_is_there():
    trials = list(verify.trials(parts=["ops", "blocks"]))
    assert {t.what for t in trials if t.part == "ops"} == set(ops.NAMES)
    whats = {t.what for t in trials if t.part == "blocks"}
    residual = [c.__name__ for c in modules.PLAIN if issubclass(c, blocks.ResidualBlock)]
    assert {f"{kind} {shortcut}" for kind in residual for shortcut in blocks.SHORTCUTS} <= whats
    assert {"ConvBNAct2d", "ConvBNAct2d residual", "BN+ReLU", "add+ReLU"} <= whats
    quick = list(verify.trials(parts=["ops", "blocks"], quick=True))
    assert {t.what for t in quick} == {t.what for t in trials}
    assert len(quick) < len(trials) / 3


def replace_op(monkeypatch, op, wrong):
    """Every implementation of `op` gives `wrong(results, args)` instead of its results."""
    resolve = backends.resolve

    def resolve_wrong(name, *args):
        right = resolve(name, *args)
        changed = right._replace(run=lambda *args: wrong(right.run(*args), args))
        return changed if name == op else right

    monkeypatch.setattr(backends, "resolve", resolve_wrong)


def scaled(results, args):
    return tuple(r * 1.001 if r.is_floating_point() else r for r in results)


def one_nan(results, args):
    results[0].view(-1)[0] = float("nan")
    return results


def all_set(results, args):
    return results[0], torch.full_like(results[1], 255)


def other_format(results, args):
    last = results[0].is_contiguous(memory_format=torch.channels_last)
    fmt = torch.contiguous_format if last else torch.channels_last
    return results[0].contiguous(memory_format=fmt), results[1]


def raising(results, args):
    raise IndexError("out of range")


def bias_running_variance(monkeypatch):
    update = functional.update_running

    def biased(chain, norms):
        norms = [(*ours, b._replace(m2=b.m2 * (b.count - 1) / b.count)) for *ours, b in norms]
        update(chain, norms)

    monkeypatch.setattr(functional, "update_running", biased)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "tensor", "why"),
    [
        (scaled, "y", ""),
        (one_nan, "y", "NaN or infinity in the result"),
        (all_set, "mask", ""),
        (other_format, "y", "memory format"),
        (raising, "result", "IndexError: out of range"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_wrong_op_is_named(monkeypatch, capsys, tmp_path, wrong, tensor, why):
    replace_op(monkeypatch, "bn_act", wrong)
    path = tmp_path / "deep" / "checks.json"
    assert cli.main(["verify", "--quick", "--impl", "reference", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("FAIL bn_act"))
    assert f", {tensor}: " in line
    assert why in line
    assert out.splitlines()[-1].startswith("verify: FAILED, ")
    found = json.loads(path.read_text())
    assert found["ok"] is False
    assert found["failed"] == sum(not check["ok"] for check in found["checks"])
    wrong_ops = {c["what"] for c in found["checks"] if not c["ok"] and c["part"] == "ops"}
    assert wrong_ops == {"bn_act"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "wrong", "block", "tensor"),
    [
        ("bn_finalize", lambda r, args: (r[0] * 1.00003, *r[1:]), "Bottleneck none", "y"),
        ("bn_act_bwd_reduce", lambda r, args: (0 * r[0], *r[1:]), "BN+ReLU", "grad bn.bias"),
        ("bn_act_bwd_apply", lambda r, args: r * 1.0001, "PreActBasicBlock identity", "grad x"),
        ("conv_bprop", lambda r, args: (r[0], r[1] * 1.0001, *r[2:]), "BasicBlock projection",
         "grad conv1.weight"),
        ("conv_bprop", lambda r, args: (r[0] * 1.0001, *r[1:]), "BasicBlock zero_pad", "grad x"),
        ("conv_bn_act", lambda r, args: r * 1.0001, "ConvBNAct2d residual", "y"),
    ],
    ids=["scale", "sum", "dz", "dw", "dx", "inference"],
)  # fmt: skip
def test_a_wrong_op_shows_in_the_blocks(monkeypatch, op, wrong, block, tensor):
    replace_op(monkeypatch, op, wrong)
    assert tensor in {check.tensor for check in failures(block)}


def test_biased_running_variance_shows(monkeypatch):
    bias_running_variance(monkeypatch)
    found = failures("Bottleneck identity")
    assert {check.tensor.rpartition(".")[2] for check in found} == {"running_var"}


def test_a_wrong_model_shows_in_its_row(monkeypatch, capsys):
    bias_running_variance(monkeypatch)
    command = ["verify", "--model", "cifar_resnet20", "--impl", "reference", "--dtype", "fp32"]
    assert cli.main(command) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAIL")]
    assert {row.split("  ")[0] for row in rows} >= {"cifar_resnet20 running statistics"}
    assert not any("gradient" in row or "forward" in row for row in rows)


def test_json_has_every_check_and_the_environment(capsys, tmp_path):
    path = tmp_path / "checks.json"
    command = ["verify", "--quick", "--impl", "reference", "--dtype", "bf16", "--json", str(path)]
    assert cli.main(command) == 0
    found = json.loads(path.read_text())
    assert found["ok"] is True
    assert found["environment"]["versions"]["torch"] == torch.__version__
    for check in found["checks"]:
        assert set(check) == {
            "part", "what", "case", "impl", "device", "dtype", "layout", "tensor", "error",
            "allowed", "ok", "why",
        }  # fmt: skip
        assert check["error"] <= check["allowed"]
        assert (check["impl"], check["dtype"]) == ("reference", "bf16")
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith(f"verify: ok, {len(found['checks'])} checks")
    header = out.splitlines()[0].split()
    assert header == list(report.HEADER)


def test_an_implementation_that_is_not_there_says_why(monkeypatch, capsys):
    monkeypatch.setattr(backends, "refusal", lambda *a: "resnet_fast._C is not built")
    assert cli.main(["verify", "--impl", "native"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    expected = "--impl native cannot run bn_stats in fp32 on cpu: resnet_fast._C is not built"
    assert expected in printed.err


def test_a_device_that_is_not_there_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["verify", "--device", "cuda"]) == 2
    assert "--device cuda: torch.cuda.is_available() is False" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--impl", "cudnn", "list of auto, reference, native, triton; got 'cudnn'"),
        ("--dtype", "fp32,fp8", "list of fp32, fp64, bf16, fp16; got 'fp8'"),
        ("--device", "tpu", "expected a comma-separated list of cpu, cuda; got 'tpu'"),
        ("--model", "resnet51", "resnet50, "),
    ],
)
def test_a_bad_value_names_its_option(capsys, option, value, expected):
    with pytest.raises(SystemExit) as raised:
        cli.main(["verify", option, value])
    assert raised.value.code == 2
    err = capsys.readouterr().err
    assert f"argument {option}: " in err
    assert expected in err


def test_nothing_checked_is_no_success():
    assert report.summary([]).startswith("verify: FAILED")
    assert report.document([], {})["ok"] is False


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [blocks.BasicBlock, blocks.PreActBottleneck])
def test_settled_blocks_keep_clear_of_the_kink(kind, dtype):
    torch.manual_seed(0)
    block = kind(8, 8, 2).double()
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64)
    before = {name: value.clone() for name, value in block.named_parameters()}
    assert settle(block, x, dtype=BY_NAME[dtype])
    seen = []
    with SeesReLU(seen):
        block(x)
    assert len(seen) == block.depth
    band = 4 * torch.finfo(torch.bfloat16).eps if dtype == "bf16" else BAND
    assert min(u.abs().min().item() for u in seen) >= 0.999 * band
    after = dict(block.named_parameters())
    moved = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert all(name.endswith(".bias") for name in moved)


class SeesReLU(torch.overrides.TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.relu:
            self.seen.append(args[0].detach())
        return func(*args, **(kwargs or {}))


def test_a_narrow_race_in_a_max_pool_is_seen():
    pool = nn.Sequential(nn.MaxPool2d(2))
    x = torch.tensor([[[[1.0, 1.0 + 1e-9], [0.0, 0.5]]]], dtype=torch.float64)
    assert not settle(pool, x)
    assert settle(pool, torch.tensor([[[[1.0, 1.1], [0.0, 0.5]]]], dtype=torch.float64))


def test_luck_of_the_plain_run_fails_nothing():
    """With one thread it comes nearer than the judged result, with three it does not."""
    exact = torch.randn(40, dtype=torch.float64)
    poor = exact.float() + 1e-4

    def prepare():
        def same():
            return [{"y": exact.float() if torch.get_num_threads() < 3 else poor}]

        return Runs(lambda: {"y": poor}, same, lambda: {"y": exact})

    setting = Setting("native", "cpu", "fp32", "nchw")
    (found,) = Trial("ops", "op", "a case", setting, prepare).run()
    assert found.ok, found


def test_other_layout_is_the_other():
    setting = Setting("auto", "cpu", "fp32", "nchw")
    assert setting.other_layout.layout == "channels_last"
    assert setting.other_layout.other_layout == setting
