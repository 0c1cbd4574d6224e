"""The models: counts and names from the literature, plain twins, options, errors, travel."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision_ops
from torch import nn
from twins import randomize

from resnet_fast import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck, models
from resnet_fast.dispatch import ops
from resnet_fast.models import ResNet, create_model, list_models
from resnet_fast.spec.tolerance import assert_close

# Millions of parameters, to as many digits as papers and torchvision's documentation give.
PARAMETERS = {
    "resnet18": "11.69",
    "resnet34": "21.80",
    "resnet50": "25.56",
    "resnet101": "44.55",
    "resnet152": "60.19",
    "resnext50_32x4d": "25.03",
    "resnext101_32x8d": "88.79",
    "resnext101_64x4d": "83.46",
    "wide_resnet50_2": "68.88",
    "wide_resnet101_2": "126.89",
    "preact_resnet200": "64.7",
    "cifar_resnet20": "0.27",
    "cifar_resnet32": "0.46",
    "cifar_resnet44": "0.66",
    "cifar_resnet56": "0.85",
    "cifar_resnet110": "1.7",
    "cifar_preact_resnet110": "1.7",
    "cifar_preact_resnet164": "1.7",
    "cifar_preact_resnet1001": "10.3",
    "small_resnet": "11.17",
}
BLOCKS = [BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck]
# One small net of each family: two stages, the second with a stride and a block after it.
TINY = {"layers": [1, 2], "num_classes": 5, "planes": 8}
CIFAR = {"stem": "cifar"}
FAMILIES = {
    "resnet-basic": {"block": BasicBlock},
    "resnet-bottleneck": {"block": Bottleneck},
    "resnext": {"block": Bottleneck, "groups": 4, "width_per_group": 16},
    "wide": {"block": Bottleneck, "width_per_group": 128},
    "dilated": {"block": Bottleneck, "replace_stride_with_dilation": [True]},
    "preact-basic": {"block": PreActBasicBlock},
    "preact-bottleneck": {"block": PreActBottleneck},
    "plain-basic": {"block": BasicBlock, "shortcut": "none"},
    "cifar": {"block": BasicBlock, "shortcut": "zero_pad", **CIFAR},
    "cifar-plain": {"block": BasicBlock, "shortcut": "none", **CIFAR},
    "cifar-preact-basic": {"block": PreActBasicBlock, "shortcut": "zero_pad", **CIFAR},
    "cifar-preact-bottleneck": {"block": PreActBottleneck, **CIFAR},
    "option-c": {"block": Bottleneck, "shortcut": "projection", **CIFAR},
    "small": {"block": BasicBlock, **CIFAR},
}


def on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **options)


def tiny(family, **options):
    return ResNet(**{**TINY, **FAMILIES[family], **options})


def step(model, x):
    """Logits, and what a backward pass and the running statistics left behind."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    logits = model(x)
    logits.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits, "x": x.grad, **gradients, **dict(model.named_buffers())}


class TestRegistry:
    def test_every_name_is_a_documented_function(self):
        assert list_models() == sorted(list_models())
        for name in list_models():
            function = getattr(models, name)
            assert function.__name__ == name and name in models.__all__
            assert inspect.getdoc(function)

    def test_every_plain_twin_is_listed(self):
        for name in ["resnet18", "resnet34", *(f"cifar_resnet{d}" for d in (20, 32, 44, 56, 110))]:
            assert {name, f"plain_{name}"} <= set(list_models())

    @pytest.mark.parametrize("name", list_models())
    def test_builds_fused_and_plain_with_one_state_dict(self, name):
        fused, plain = on_meta(name), on_meta(name, fused=False)
        described = [
            [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
            for model in (fused, plain)
        ]
        assert described[0] == described[1]
        assert not any("resnet_fast.modules" in type(m).__module__ for m in plain.modules())

    @pytest.mark.parametrize("name", PARAMETERS)
    def test_parameter_count(self, name):
        expected = PARAMETERS[name]
        count = sum(p.numel() for p in on_meta(name).parameters()) / 1e6
        assert f"{count:.{len(expected.partition('.')[2])}f}" == expected

    def test_preact_1001_has_the_papers_10_2_million_without_norms(self):
        model = on_meta("cifar_preact_resnet1001")
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        count = sum(p.numel() for layer in layers for p in layer.parameters())
        assert f"{count / 1e6:.1f}" == "10.2"

    @pytest.mark.parametrize(("name", "depth"), [(f"resnet{d}", d) for d in (18, 50, 152)] + [
        ("preact_resnet200", 200), ("cifar_resnet56", 56), ("plain_cifar_resnet110", 110),
        ("cifar_preact_resnet164", 164), ("cifar_preact_resnet1001", 1001),
    ])  # fmt: skip
    def test_depth(self, name, depth):
        model = on_meta(name)
        layers = [key for key, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert sum("downsample" not in key for key in layers) == depth

    def test_unknown_name_offers_close_ones(self):
        with pytest.raises(ValueError, match=r"^name: .*'resnet5'; did you mean .*resnet50"):
            create_model("resnet5")
        with pytest.raises(ValueError, match=r"^name: .*'xyz'; valid names: .*cifar_resnet20"):
            create_model("xyz")

    def test_options_reach_the_class(self):
        model = create_model("cifar_resnet20", num_classes=7, impl="reference", in_channels=1)
        assert model.fc.out_features == 7 and model.conv1.in_channels == 1
        assert model.impl == "reference"
        assert all(block.impl == "reference" for block in model.layer2)

    @pytest.mark.parametrize("option", ["classes", "weight"])
    def test_unknown_option(self, option):
        with pytest.raises(TypeError, match=option):
            create_model("resnet18", **{option: 1})

    def test_an_option_that_makes_the_model_is_taken(self):
        with pytest.raises(TypeError, match="groups"):
            create_model("resnext50_32x4d", groups=2)


class TestTorchvisionsLayout:
    @staticmethod
    def keys(convs, layers, expansion):
        """torchvision's naming rule, written out for `convs` convolutions a block."""
        norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        keys = ["conv1.weight", *(f"bn1.{leaf}" for leaf in norm)]
        for stage, count in enumerate(layers, start=1):
            for block in range(count):
                at = f"layer{stage}.{block}"
                for i in range(1, convs + 1):
                    keys += [f"{at}.conv{i}.weight", *(f"{at}.bn{i}.{leaf}" for leaf in norm)]
                if block == 0 and (stage > 1 or expansion > 1):
                    keys += [f"{at}.downsample.0.weight"]
                    keys += [f"{at}.downsample.1.{leaf}" for leaf in norm]
        return [*keys, "fc.weight", "fc.bias"]

    @pytest.mark.parametrize(("name", "convs", "layers", "expansion", "count"), [
        ("resnet18", 2, [2, 2, 2, 2], 1, 122),
        ("resnet50", 3, [3, 4, 6, 3], 4, 320),
        ("resnext50_32x4d", 3, [3, 4, 6, 3], 4, 320),
        ("wide_resnet101_2", 3, [3, 4, 23, 3], 4, 626),
    ])  # fmt: skip
    def test_state_dict_keys(self, name, convs, layers, expansion, count):
        keys = list(on_meta(name).state_dict())
        assert keys == self.keys(convs, layers, expansion)
        assert len(keys) == count

    def test_children(self):
        names = [name for name, _ in on_meta("resnet50").named_children()]
        layers = ["layer1", "layer2", "layer3", "layer4"]
        assert names == ["conv1", "bn1", "relu", "maxpool", *layers, "avgpool", "fc"]

    @pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
    def test_same_parameters_from_one_seed(self, name):
        if (reason := torchvision_ops.why_not("torchvision")) is not None:
            pytest.skip(reason)
        from torchvision import models

        torch.manual_seed(0)
        theirs = getattr(models, name)().eval()
        torch.manual_seed(0)
        ours = create_model(name).eval()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        torch.testing.assert_close(ours.double()(x), theirs.double()(x))

    def test_children_in_a_row_are_the_model_without_fc(self):
        model = randomize(tiny("resnet-basic")).double().eval()
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        features = nn.Sequential(*list(model.children())[:-1])
        torch.testing.assert_close(model.fc(features(x).flatten(1)), model(x))


class TestPlainTwin:
    @pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep_activations"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_equal_in_fp64(self, family, keep, impl, layout):
        """Logits, every gradient and running statistic, in training and with frozen statistics.

        This is about structure, not rounding: fp64 leaves room for torch's own default tolerance.
        """
        impl.need(torch.float64, *ops.NAMES)
        impl.need_speed()
        plain = randomize(tiny(family, fused=False))
        fused = tiny(family, impl=impl.name, keep_activations=keep)
        fused.load_state_dict(plain.state_dict())
        plain, fused = (
            m.to(impl.device, torch.float64, memory_format=layout) for m in (plain, fused)
        )
        x = torch.randn(3, 3, 24, 24, dtype=torch.float64, device=impl.device)
        x = x.to(memory_format=layout)
        for mode in (True, False):
            torch.testing.assert_close(step(fused.train(mode), x), step(plain.train(mode), x))
        with torch.inference_mode():
            torch.testing.assert_close(fused(x), plain(x))
        plain.load_state_dict(fused.state_dict())

    @pytest.mark.parametrize("name", [n for n in list_models() if n.startswith("plain_")])
    def test_a_plain_net_has_no_shortcut(self, name):
        model, twin = on_meta(name), on_meta(name.removeprefix("plain_"))
        keys = [key for key in twin.state_dict() if "downsample" not in key]
        assert list(model.state_dict()) == keys
        blocks = [b for b in model.modules() if isinstance(b, BasicBlock)]
        assert {b.parts().shortcut for b in blocks} == {"none"}

    def test_the_switch_turns_stem_and_head(self):
        model = tiny("preact-basic").double()
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        before, calls = model(x), []
        for norm in (model.bn1, model.bn_last):
            norm.register_forward_hook(lambda module, *_: calls.append(module))
        model.fused = False
        torch.testing.assert_close(model(x), before)
        assert calls == [model.bn1, model.bn_last]


class TestPapers:
    def test_preactivation_by_hand(self):
        """arXiv:1603.05027, eq. 4 and 5 and the appendix: first and last unit are special."""
        model = randomize(tiny("preact-basic", layers=[1, 1], **CIFAR)).double().eval()
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        first, second = model.layer1[0], model.layer2[0]
        assert first.bn1 is None
        a = F.relu(model.bn1(model.conv1(x)))
        h = a + first.conv2(F.relu(first.bn2(first.conv1(a))))
        a = F.relu(second.bn1(h))
        h = second.downsample(a) + second.conv2(F.relu(second.bn2(second.conv1(a))))
        expected = model.fc(F.relu(model.bn_last(h)).mean((2, 3)))
        torch.testing.assert_close(model(x), expected)

    def test_option_a_by_hand(self):
        """arXiv:1512.03385, section 3.3: every second pixel, zeros in the new channels."""
        model = randomize(tiny("cifar", layers=[1, 1])).double().eval()
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        h = F.relu(model.bn1(model.conv1(x)))
        for block in (model.layer1[0], model.layer2[0]):
            branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(h)))))
            if block.stride == 2:
                h = torch.cat([h[:, :, ::2, ::2], torch.zeros_like(branch[:, 8:])], dim=1)
            h = F.relu(branch + h)
        torch.testing.assert_close(model(x), model.fc(h.mean((2, 3))))

    def test_he_initialization(self):
        """arXiv:1502.01852, eq. 14: variance 2 / fan_out; normalizations are the identity."""
        model = create_model("resnet18")
        conv = model.layer4[1].conv1.weight
        assert conv.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
        assert conv.mean().abs().item() < conv.std().item() / 100
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)

    @pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)
    def test_zero_init_residual_starts_as_the_shortcut(self, block):
        model = ResNet(block, **TINY, zero_init_residual=True, **CIFAR)
        relu = nn.Identity() if block.preactivation else nn.ReLU()
        inside = model.layer2[1]
        x = torch.randn(2, inside.out_channels, 8, 8)
        torch.testing.assert_close(inside(x), relu(x), rtol=0, atol=0)
        first, a = model.layer1[0], torch.randn(2, TINY["planes"], 8, 8)
        shortcut = first.downsample(a) if first.shortcut == "projection" else a
        torch.testing.assert_close(first(a), relu(shortcut))

    @pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)
    def test_zero_init_residual_learns(self, block):
        model = ResNet(block, **TINY, zero_init_residual=True, **CIFAR)
        step(model, torch.randn(2, 3, 8, 8))
        last = "conv" if block.preactivation else "bn"
        for unit in (*model.layer1, *model.layer2):
            assert getattr(unit, f"{last}{unit.depth}").weight.grad.norm() > 0

    def test_dilation_keeps_the_image(self):
        """As torchvision's: a stage's first block still has the dilation of the stage before."""
        options = {"layers": [1, 2, 2, 2], "replace_stride_with_dilation": [False, True, True]}
        model, shapes = tiny("resnet-bottleneck", **options), []
        for i in range(1, 5):
            stage = getattr(model, f"layer{i}")
            stage.register_forward_hook(lambda _, x, y: shapes.append(tuple(y.shape)))
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)
        assert shapes == [(1, 32, 16, 16), (1, 64, 8, 8), (1, 128, 8, 8), (1, 256, 8, 8)]
        stages = (model.layer2, model.layer3, model.layer4)
        dilations = [[block.conv2.dilation[0] for block in stage] for stage in stages]
        assert dilations == [[1, 1], [1, 2], [2, 4]]


class TestRuns:
    @pytest.mark.parametrize("name", [
        "resnet18", "resnext50_32x4d", "preact_resnet18", "plain_resnet18", "cifar_resnet20",
        "cifar_resnet110", "plain_cifar_resnet20", "cifar_preact_resnet110",
        "cifar_preact_resnet164", "small_resnet",
    ])  # fmt: skip
    def test_forward_and_backward(self, name):
        model = create_model(name, num_classes=4)
        out = step(model, torch.randn(2, 3, 32 if model.stages == 4 else 8, 32))
        assert out["logits"].shape == (2, 4)
        assert all(value is not None and value.isfinite().all() for value in out.values())
        with torch.inference_mode():
            assert model.eval()(torch.randn(1, 3, 32, 32)).isfinite().all()

    @pytest.mark.parametrize("family", ["resnet-basic", "cifar-preact-bottleneck", "cifar"])
    def test_to_dtype(self, family, dtype):
        plain = randomize(tiny(family, fused=False)).eval()
        fused, x = tiny(family).eval(), torch.randn(2, 3, 32, 32)
        fused.load_state_dict(plain.state_dict())
        own = torch.float32 if dtype == torch.float64 else dtype
        with torch.no_grad():
            y = fused.to(dtype)(x.to(dtype))
            same, double = plain.to(own)(x.to(own)), plain.double()(x.to(own).double())
        assert_close(y, same, double)

    @pytest.mark.parametrize(
        "travel",
        [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
        ids=["deepcopy", "pickle"],
    )
    @pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
    def test_travels(self, travel, fused):
        model = randomize(tiny("preact-bottleneck", fused=fused)).eval()
        other, x = travel(model), torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
        assert {p.data_ptr() for p in other.parameters()}.isdisjoint(
            p.data_ptr() for p in model.parameters()
        )
        assert repr(other) == repr(model)

    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["cifar", "cifar-preact-bottleneck"])
    def test_compiles_whole(self, family):
        model = randomize(tiny(family)).double()
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
        expected, got = step(model, x), step(compiled, x)
        got = {name.removeprefix("_orig_mod."): value for name, value in got.items()}
        torch.testing.assert_close(got, expected)
        torch._dynamo.reset()


ERRORS = {
    "block": ({"block": nn.Conv2d}, "block"),
    "no stage": ({"layers": []}, "layers"),
    "no block": ({"layers": [1, 0]}, "layers"),
    "layers of floats": ({"layers": [1.0]}, "layers"),
    "num_classes": ({"num_classes": 0}, "num_classes"),
    "num_classes bool": ({"num_classes": True}, "num_classes"),
    "groups": ({"groups": -1}, "groups"),
    "width_per_group": ({"width_per_group": 1.5}, "width_per_group"),
    "planes": ({"planes": "8"}, "planes"),
    "in_channels": ({"in_channels": 0}, "in_channels"),
    "flags": ({"replace_stride_with_dilation": [True, True]}, "replace_stride_with_dilation"),
    "norm_layer": ({"norm_layer": lambda channels: nn.GroupNorm(1, channels)}, "norm_layer"),
    "shortcut": ({"shortcut": "zero"}, "shortcut"),
    "identity": ({"shortcut": "identity"}, "shortcut"),
    "stem": ({"stem": "mnist"}, "stem"),
    "impl": ({"impl": "fast"}, "impl"),
    "plain impl": ({"impl": "native", "fused": False}, "impl"),
    "zero plain net": ({"zero_init_residual": True, "shortcut": "none"}, "zero_init_residual"),
}


@pytest.mark.parametrize(("options", "argument"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_the_argument(options, argument):
    with pytest.raises(ValueError, match=rf"^{argument}: "):
        tiny("resnet-basic", **options)
