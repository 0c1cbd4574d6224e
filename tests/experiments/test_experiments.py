"""`resnet-fast experiment`: every experiment in small, by what it is there to show.

The nets are narrow and the images 8 pixels wide, so that all of them train in seconds; the claims
held for every seed that was tried when the sizes were chosen.
"""

import argparse
import json
import random
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from resnet_fast import cli, create_model, modules
from resnet_fast.blocks import zero_pad
from resnet_fast.commands import experiment
from resnet_fast.experiments import (
    EXPERIMENTS,
    activations,
    bottleneck,
    bugs,
    compare,
    degradation,
    exercise,
    findings,
    gradient_flow,
    nets,
    options,
    shortcuts,
    surgery,
)
from resnet_fast.training import Recipe, fit, load_data

EXERCISE = "degradation --preset exercise"
SMALL = {
    "degradation": "--size 8 --planes 8 --depths 8,32 --epochs 8",
    EXERCISE: "--planes 8 --epochs 8 --repeats 1",
    "gradient-flow": "--depths 8,56 --batch-size 32",
    "preact": "--depths 56 --epochs 4 --repeats 1",
    "shortcuts": "--depth 20 --planes 8 --epochs 8 --repeats 1",
    "bottleneck": "--pixels 32 --batch-size 2 --rounds 1",
    "activations": "--size 8 --planes 8 --depth 20 --epochs 4",
    "lesion": "--depth 20 --epochs 8 --most 3 --draws 4",
    "bugs": "--depth 32 --planes 8 --epochs 4 --repeats 1",
}


@pytest.fixture(autouse=True)
def one_thread():
    """The nets are so small that more threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(name, out, *more):
    """The experiment in small, from the command line; figures.json as it wrote it."""
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    arguments = ["experiment", *name.split(), *SMALL[name].split(), *more, "--out", str(out)]
    assert cli.main(arguments) == 0
    return json.loads((out / "figures.json").read_text())


def check_page(name, out, record):
    """The page and its picture are there and tell what figures.json holds."""
    page = (out / "index.html").read_text(encoding="utf-8")
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("<img") == 1 and "data:image/png;base64," in page
    assert page.count('<li class="') == len(record["claims"])
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    assert record["experiment"] == name and record["settings"]["seed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXPERIMENTS, EXERCISE])
def test_what_it_is_there_to_show(name, tmp_path, capsys):
    record = run(name, tmp_path)
    told = capsys.readouterr().out
    check_page(name.split()[0], tmp_path, record)
    assert record["claims"]
    for claim in record["claims"]:
        assert claim["holds"], claim["text"]
        assert claim["text"] in told
    SHOWN[name](record["figures"])


def final(figures, net, key):
    """`key` after the last epoch."""
    (rows,) = figures[net]["repeats"]
    return rows[-1][key]


def shown_degradation(figures):
    assert final(figures, "residual-32", "test_accuracy") > 0.85
    assert final(figures, "plain-32", "test_accuracy") < 0.75
    assert final(figures, "plain-8", "train_loss") < final(figures, "plain-32", "train_loss") / 2
    assert figures["plain-32"]["parameters"] == figures["residual-32"]["parameters"]


def shown_exercise(figures):
    found, parameters = figures["nets"], figures["parameters"]
    assert list(found) == list(exercise.NETS)
    assert final(found, exercise.PLAIN, "train_loss") > final(found, exercise.A, "train_loss")
    assert final(found, exercise.BASIC, "train_loss") < final(found, exercise.PLAIN, "train_loss")
    assert {name: one["parameters"] for name, one in found.items()}.items() <= parameters.items()


def shown_gradient_flow(figures):
    assert figures["toy_block"]["residual"] > 1000 * figures["toy_block"]["plain"]
    norms = figures["norms"]
    assert len(norms["plain"]["56"]) == 55  # a stem and 27 blocks of two
    assert norms["plain"]["56"][0] > 100 * norms["residual"]["56"][0]
    assert all(0 < value < 100 for value in norms["residual"]["56"])


def shown_preact(figures):
    losses = {kind: [row["train_loss"] for row in figures[f"{kind}-56"]["repeats"][0]]
              for kind in ("pre", "post")}  # fmt: skip
    assert losses["pre"][-1] < 0.75 * losses["post"][-1]


def shown_shortcuts(figures):
    losses = {kind: final(figures, kind, "train_loss") for kind in shortcuts.KINDS}
    assert min(losses, key=losses.get) != shortcuts.NONE
    assert losses[shortcuts.A] < losses[shortcuts.NONE] / 2


def shown_bottleneck(figures):
    found = figures["nets"]
    assert found[bottleneck.BOTTLENECK]["parameters"] == 25_557_032  # torchvision's ResNet-50
    assert found[bottleneck.BOTTLENECK]["multiply_adds"] == pytest.approx(4.09e9, rel=1e-2)
    assert all(one["training_images_per_second"] > 0 for one in found.values())


def shown_activations(figures):
    stages = figures["stages"]
    assert [one["channels"] for one in stages.values()] == [8, 8, 16, 32]
    assert [one["size"] for one in stages.values()] == [8, 8, 4, 2]
    assert all(0 < one["sparsity"] < 1 for one in stages.values())


def shown_lesion(figures):
    plain, residual = figures["errors"]["plain"], figures["errors"]["residual"]
    assert len(plain["alone"]) == len(residual["alone"]) == 7
    assert min(residual["alone"]) < 0.2 < 0.5 < min(plain["alone"])


def shown_bugs(figures):
    right = final(figures, bugs.RIGHT, "train_loss")
    assert final(figures, bugs.BARE, "train_loss") > 1.5 * right
    assert figures[bugs.EARLY]["parameters"] == figures[bugs.RIGHT]["parameters"]


SHOWN = {
    name: globals()[f"shown_{name.replace('-', '_')}"] for name in EXPERIMENTS
} | {EXERCISE: shown_exercise}  # every experiment's numbers, beside its own claims


NETS = {
    "plain": ("none", modules.BasicBlock),
    "residual": ("zero_pad", modules.BasicBlock),
    "projections": ("projection", modules.BasicBlock),
    "pre-activation": ("zero_pad", modules.PreActBasicBlock),
    "bottlenecks": (None, modules.Bottleneck),
    "chain": (None, None),
    bugs.EARLY: ("zero_pad", bugs.BLOCKS[bugs.EARLY]),
    bugs.BARE: ("zero_pad", bugs.BLOCKS[bugs.BARE]),
}


@pytest.mark.parametrize("kind", NETS)
def test_the_fused_blocks_repeat_the_curves_of_plain_pytorch(impl, kind):
    """Two epochs of five steps, in fp64: in fp32 training soon multiplies the rounding."""
    impl.need(torch.float64)
    impl.need_speed()
    if impl.name == "reference":
        pytest.skip("plain PyTorch is what the others are compared with")
    pytest.importorskip("sklearn")
    data, recipe = load_data("digits", size=8), Recipe(epochs=2, batch_size=280, lr=0.05, warmup=1)
    shortcut, block = NETS[kind]

    def losses(name):
        torch.manual_seed(0)
        chosen = block[name != "reference"] if isinstance(block, tuple) else block
        if kind == "chain":
            model = nets.chain(8, planes=4, impl=name)
        else:
            model = nets.net(8, shortcut, block=chosen, planes=4, impl=name)
        model = model.double()
        history = fit(model, data, recipe, device=impl.device)
        return [*history.losses, *(row["test_loss"] for row in history.epochs)]

    assert losses(impl.name) == pytest.approx(losses("reference"), rel=1e-9)


@pytest.mark.parametrize("name", exercise.NETS)
def test_reference_is_built_of_plain_modules(name):
    model = exercise.NETS[name](impl="reference")
    assert not any(type(module).__module__ == "resnet_fast.modules" for module in model.modules())
    fused = exercise.NETS[name]()
    assert list(model.state_dict()) == list(fused.state_dict())
    assert any(type(module).__module__ == "resnet_fast.modules" for module in fused.modules())


def test_the_nets_of_the_exercise():
    """Net A: stride 2 every two layers. Depths count fc, not the projections of shortcuts."""
    found = {name: build(planes=4) for name, build in exercise.NETS.items()}
    layers = [m.conv for m in found[exercise.A] if isinstance(m, modules.ConvBNAct2d)]
    assert [conv.stride[0] for conv in layers] == [1, 1, 2, 1, 2, 1, 2, 1]
    assert [conv.out_channels for conv in layers] == [4, 4, 8, 8, 16, 16, 32, 32]
    assert {conv.kernel_size for conv in layers} == {(3, 3)}
    deep = [m.conv for m in found[exercise.PLAIN] if isinstance(m, modules.ConvBNAct2d)]
    assert len(deep) == 20 and [i for i, c in enumerate(deep) if c.stride == (2, 2)] == [5, 10, 15]
    for name, layers in {exercise.B: 14, exercise.BASIC: 20, exercise.BOTTLENECK: 50}.items():
        convs = [key for key in found[name].state_dict() if re.search(r"conv\d\.weight$", key)]
        assert len(convs) + 1 == layers


def test_the_toy_block_by_numpy_is_the_one_of_autograd():
    found = gradient_flow.toy_block()
    rng = np.random.default_rng(0)
    w1, w2 = (torch.from_numpy(rng.normal(0, 0.01, (8, 8))) for _ in range(2))
    x = torch.from_numpy(rng.normal(0, 1, 8)).requires_grad_()
    branch = w2 @ (w1 @ x).relu()
    for name, y in {"plain": branch, "residual": branch + x}.items():
        (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert found[name] == pytest.approx(dx.norm().item(), rel=1e-12)
    told = f"{found['plain']:.6f} {found['residual']:.6f} {found['ratio']:.1f}"
    assert told == "0.000468 2.828725 6046.3"


@pytest.mark.parametrize("depth", [1, 2, 7, 21])
def test_depths_are_6n_plus_2(depth, capsys):
    with pytest.raises(ValueError, match="depth: expected 6n"):
        nets.blocks_of(depth)
    for words in (["degradation", "--depths", f"8,{depth}"], ["lesion", "--depth", str(depth)]):
        with pytest.raises(SystemExit):
            cli.main(["experiment", *words])
        assert "expected 6n + 2 layers" in capsys.readouterr().err


def parse(name, *words):
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser)
    return parser.parse_args([name, *words])


def test_preset_paper_has_the_size_of_the_paper(monkeypatch):
    """He et al. 2015, section 4.2: 64k steps of 128 images, a tenth from 32k and from 48k."""
    seen = {}
    data = argparse.Namespace(num_classes=10, channels=3)
    monkeypatch.setattr(compare, "data_of", lambda args: data)

    def stop(builders, data, args):
        seen.update(names=list(builders), recipe=compare.recipe_of(args), data=args.data)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare", stop)
    with pytest.raises(KeyboardInterrupt):
        degradation.run(parse("degradation", "--preset", "paper", "--path", "data", "--lr", "0.2"))
    assert seen["data"] == "cifar10"
    depths, kinds = (20, 32, 44, 56, 110), ("plain", "residual")
    assert seen["names"] == [f"{kind}-{depth}" for depth in depths for kind in kinds]
    recipe = seen["recipe"]
    assert recipe.epochs * 50_000 / recipe.batch_size == pytest.approx(64_000, rel=0.01)
    assert (recipe.schedule, recipe.weight_decay, recipe.lr) == ("step", 1e-4, 0.2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("degradation --preset paper", "path: cifar10"),
        ("degradation --preset exercise --data cifar10", "path: cifar10"),
        ("degradation --preset exercise --depths 8", "depths: --preset exercise has"),
        ("activations --index -1 --epochs 1 --size 8 --depth 8", "index: expected 0 to 359"),
        ("lesion --depth 8", "depth: expected at least 14"),
        ("bugs --impl triton --device cuda", "cuda"),
    ],
)
def test_what_cannot_be_run_is_told(words, expected, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["experiment", *words.split(), "--out", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_without_matplotlib_the_figures_are_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["experiment", "bottleneck", *SMALL["bottleneck"].split(), "--out", str(tmp_path)]
    assert cli.main(words) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert json.loads((tmp_path / "figures.json").read_text())["figures"]["nets"]


def test_a_claim_that_fails_is_told_not_hidden(tmp_path):
    pytest.importorskip("matplotlib")
    found = findings.Findings(
        "Title", "One.\n\nTwo < three.", [findings.Claim("no", False), findings.Claim("aye", True)],
        [["a", "b"], ["c", "1"]], {"loss": float("nan")}, lambda figure: figure.subplots(),
    )  # fmt: skip
    assert "NO   no" in findings.text(found) and "yes  aye" in findings.text(found)
    page = findings.write(found, "name", {"seed": 0}, tmp_path).read_text()
    assert '<li class="bad">no</li>' in page and "Two &lt; three." in page
    record = json.loads((tmp_path / "figures.json").read_text())
    assert record["figures"] == {"loss": None}
    assert [claim["holds"] for claim in record["claims"]] == [False, True]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_options_have_names_and_defaults(name):
    args = parse(name)
    assert args.seed == 0 and args.impl == "auto"
    assert "out" not in options.settings(args)


def test_the_early_relu_is_what_it_says(impl):
    impl.need(torch.float64)
    torch.manual_seed(0)
    fused = bugs.FusedEarlyReLU(8, 16, 2, shortcut="zero_pad", impl=impl.name)
    fused.double().to(impl.device)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, device=impl.device, requires_grad=True)
    h = F.relu(fused.bn1(fused.conv1(x)))
    expected = F.relu(fused.bn2(fused.conv2(h))) + zero_pad(x, 2, 16)
    weights, inputs = torch.randn_like(expected), [x, *fused.parameters()]
    grads = torch.autograd.grad(expected, inputs, weights)
    y = fused(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, weights), grads)


@pytest.mark.parametrize("name", [bugs.EARLY, bugs.BARE])
def test_the_wrong_blocks_agree_with_their_plain_twins(name):
    plain, fused = bugs.BLOCKS[name]
    torch.manual_seed(0)
    one = plain(8, 8, shortcut="identity").double()
    other = fused(8, 8, shortcut="identity").double()
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(one(x), other(x))
    right = bugs.BLOCKS[bugs.RIGHT][0](8, 8).double()
    right.load_state_dict(one.state_dict())
    assert not torch.allclose(right(x), one(x))


def test_identity_only_leaves_out_what_changes_shapes():
    model = shortcuts.identity_only(nets.net(14, "zero_pad"))
    kinds = [block.shortcut for stage in (model.layer1, model.layer2) for block in stage]
    assert kinds == ["identity", "identity", "none", "identity"]


def test_surgery_leaves_no_trace():
    torch.manual_seed(0)
    model = nets.net(20, "zero_pad", planes=4).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = model(x)
        places, pairs = surgery.places(model), surgery.pairs(model)
        assert len(places) == 7  # 3 in the first stage, 2 in each that changes shapes first
        assert len(pairs) == 5
        chosen = random.Random(0).sample(places, 3)
        with surgery.deleted(chosen):
            identities = [m for m in model.modules() if isinstance(m, torch.nn.Identity)]
            assert len(identities) == 4  # and the max-pool's place in this stem
            assert not torch.equal(model(x), before)
        with surgery.exchanged(pairs[:2]):  # the first block is in both
            assert not torch.equal(model(x), before)
        assert torch.equal(model(x), before)
    with pytest.raises(KeyError), surgery.deleted(places):
        raise KeyError
    assert not any(type(m) is torch.nn.Identity for m in model.layer1)


def test_deleting_a_residual_block_leaves_its_shortcut():
    """relu(0 + x) = x where x is itself behind a ReLU."""
    torch.manual_seed(0)
    model = nets.net(14, "zero_pad", planes=4).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        with surgery.deleted(surgery.places(model)[1:2]):
            deleted = model(x)
        model.layer1[1].bn2.weight.zero_()
        model.layer1[1].bn2.bias.zero_()
        torch.testing.assert_close(model(x), deleted)


def test_activations_are_those_of_the_stages():
    torch.manual_seed(0)
    model = nets.net(8, "zero_pad", planes=4, impl="reference").eval()
    x = torch.randn(1, 3, 8, 8)
    found, logits = activations.stages(model, x)
    assert list(found) == ["stem", "layer1", "layer2", "layer3"]
    with torch.no_grad():
        torch.testing.assert_close(found["layer2"], model.layer2(model.layer1(found["stem"])))
        torch.testing.assert_close(logits, model(x))
    h = torch.tensor([[0.0, 0.0, 1.0, 3.0]]).view(1, 1, 2, 2)
    one = activations.statistics(h)
    assert (one["mean"], one["sparsity"]) == (1.0, 0.5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_multiply_adds_of_a_convolution():
    conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1, bias=False)
    assert bottleneck.multiply_adds(torch.nn.Sequential(conv), 8) == 4 * 4 * 8 * 3 * 9


def test_activations_of_a_net_and_an_image_of_yours(tmp_path, capsys):
    """What an untrained net does is no claim of the experiment."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    model = create_model("cifar_resnet20")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    image.new("RGB", (260, 300), (200, 40, 90)).save(tmp_path / "red.png")
    files = ["--weights", str(tmp_path / "weights.pth"), "--image", str(tmp_path / "red.png")]
    words = ["experiment", "activations", *files, "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert "those of cifar_resnet20 and plain_cifar_resnet20" in capsys.readouterr().err
    assert cli.main([*words, "--model", "cifar_resnet20"]) == 0
    assert "224×224" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert record["claims"] == [] and record["figures"]["stages"]["layer3"]["channels"] == 64
    assert "What holds" not in (tmp_path / "out" / "index.html").read_text()
