"""What `fuse` takes for a norm, a gate or a call, and what only looks like one."""

import copy
import math
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from ecosystem_norms import Frozen, NormAct
from foreign_models import Basic, ResNet
from test_fuse import assert_same_mathematics, close, fused, randomize, results
from torch import fx, nn

from resnet_fast import explain, fuse, unfuse
from resnet_fast.fusion import rewrite
from resnet_fast.modules import run_fused
from resnet_fast.spec.layers import Parts


def image(channels=4, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture
def fused_calls(monkeypatch):
    """The chains that ran fused, as they ran."""
    ran = []

    def counted(run):
        return lambda parts, *args, **options: (ran.append(parts), run(parts, *args, **options))[1]

    for name in ("run_fused", "run_gated"):
        monkeypatch.setattr(rewrite, name, counted(getattr(rewrite, name)))
    return ran


class Arithmetic(nn.Module):
    """A norm of running statistics, as `formula` writes it."""

    def __init__(self, formula, channels=4):
        super().__init__()
        self.formula, self.eps = formula, 1e-3
        for name in ("weight", "bias", "running_mean"):
            self.register_buffer(name, torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.1)

    def forward(self, x):
        w, b, m, v = (
            t.reshape(1, -1, 1, 1)
            for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        return self.formula(x, w, b, m, v, self.eps)


def unit(norm):
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), norm, nn.ReLU())


NORMS = {
    "scale-and-shift": lambda x, w, b, m, v, eps: (
        x * (w * (v + eps).rsqrt()) + (b - m * (w * (v + eps).rsqrt()))
    ),
    "division": lambda x, w, b, m, v, eps: (
        (b - m * w / torch.sqrt(v + eps)) + (w / torch.sqrt(v + eps)) * x
    ),
    "power": lambda x, w, b, m, v, eps: (
        x * (w * (v + eps) ** -0.5) + (b - m * w * (v + eps) ** -0.5)
    ),
    "no-eps": lambda x, w, b, m, v, eps: x * (w * v.rsqrt()) + (b - m * w * v.rsqrt()),
}
NOT_NORMS = {
    "variance": lambda x, w, b, m, v, eps: x * (w / (v + eps)) + (b - m * w / (v + eps)),
    "mean-with-its-sign": lambda x, w, b, m, v, eps: (
        x * (w * (v + eps).rsqrt()) + (b + m * (w * (v + eps).rsqrt()))
    ),
    "no-weight": lambda x, w, b, m, v, eps: x * (v + eps).rsqrt() + (b - m * (v + eps).rsqrt()),
    "clamped": lambda x, w, b, m, v, eps: (
        x * (w * (v.clamp(min=0.3) + eps).rsqrt()) + (b - m * (w * (v + eps).rsqrt()))
    ),
    "sign-of-weight": lambda x, w, b, m, v, eps: (
        x * ((w * w).sqrt() * (v + eps).rsqrt()) + (b - m * ((w * w).sqrt() * (v + eps).rsqrt()))
    ),
    "sign-of-variance": lambda x, w, b, m, v, eps: (
        x * (w * ((v * v).sqrt() + eps).rsqrt()) + (b - m * (w * ((v * v).sqrt() + eps).rsqrt()))
    ),
    "twice": lambda x, w, b, m, v, eps: (
        x * (w * (v + eps).rsqrt()) * 2 + (b - m * (w * (v + eps).rsqrt()))
    ),
}  # fmt: skip


class TestNorms:
    @pytest.mark.parametrize("name", NORMS)
    def test_arithmetic_of_running_statistics_is_one(self, name, fused_calls):
        model = unit(Arithmetic(NORMS[name])).double()
        assert fused(fuse(model)) == {"(model)": "Sequential: conv norm relu"}
        assert_same_mathematics(model, image())
        (norm,) = {parts.norms[1].eps for parts in fused_calls}
        assert norm == (0.0 if name == "no-eps" else 1e-3)

    @pytest.mark.parametrize("name", NOT_NORMS)
    def test_other_arithmetic_is_none(self, name):
        model = unit(Arithmetic(NOT_NORMS[name])).double()
        assert "norm" not in str(fused(fuse(model)))
        assert_same_mathematics(model, image())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_frozen_norms_give_the_dtype_that_plain_gives(self, dtype, autocast, fused_calls):
        plain = unit(Frozen(4)).eval()
        plain[0].to(dtype)
        model, x = fuse(plain), image(dtype=dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            actual, expected = model(x), plain(x)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
        assert bool(fused_calls) is (dtype == torch.float32 and not autocast)

    def test_a_frozen_norm_may_train_its_parameters(self):
        model = unit(Arithmetic(NORMS["scale-and-shift"])).double()
        norm = model[1]
        for name in ("weight", "bias"):
            value = norm._buffers.pop(name)
            norm.register_parameter(name, nn.Parameter(value))
        assert fused(fuse(model))
        assert_same_mathematics(model, image())

    def test_statistics_that_train_are_left_to_pytorch(self):
        model = unit(Arithmetic(NORMS["scale-and-shift"])).double()
        value = model[1]._buffers.pop("running_mean")
        model[1].register_parameter("running_mean", nn.Parameter(value))
        assert_same_mathematics(model, image())

    @pytest.mark.parametrize("training", [True, False])
    def test_a_norm_with_activation_follows_its_own_mode(self, training):
        model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), NormAct(4)))
        plain, model = copy.deepcopy(model), fuse(model)
        assert fused(model) == {"0": "conv norm relu"}
        for one in (plain, model):
            one.train(training)
            one[1].train(not training)
        close(model(image()), plain(image()))
        close(dict(model.named_buffers()), dict(plain.named_buffers()))

    @pytest.mark.parametrize(
        "change", [{"eps": 0.5}, {"momentum": 0.7}, {"momentum": None}, {"weight": None}]
    )
    def test_a_norm_with_activation_may_be_changed(self, change):
        model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), NormAct(4)))
        plain, model = copy.deepcopy(model), fuse(model)
        for one in (plain, model):
            for name, value in change.items():
                setattr(one[1], name, value)
        close(results(model, image()), results(plain, image()))


class Gate(nn.Module):
    """Squeeze-and-excitation, its product as `formula` writes it."""

    def __init__(self, formula):
        super().__init__()
        self.formula, self.relu = formula, nn.ReLU(inplace=True)
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def excite(self, means):
        return self.up(self.relu(self.down(means))).sigmoid()

    def forward(self, x):
        return self.formula(self, x)


class Gated(Basic):
    def __init__(self, gate):
        super().__init__(4, 4)
        self.gate = gate

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.gate(out) + x)


def linear(gate, x):
    n, c, _, _ = x.size()
    means = F.adaptive_avg_pool2d(x, 1).view(n, c)
    return x * torch.tanh(means).view(n, c, 1, 1).expand_as(x)


GATES = {
    "mean": lambda gate, x: x * gate.excite(x.mean((2, 3), keepdim=True)),
    "pool": lambda gate, x: gate.excite(F.adaptive_avg_pool2d(x, 1)) * x,
    "view": linear,
    "in-place": lambda gate, x: x * x.mean((2, 3), keepdim=True).mul_(2.0).add_(1.0),
    "means-of-means": lambda gate, x: x * torch.sigmoid(
        (p := x.mean((2, 3), keepdim=True)) * 2 - gate.excite(p).mean((2, 3), keepdim=True)
    ),
    "one-for-all": lambda gate, x: x * x.mean((2, 3), keepdim=True).mean(1, keepdim=True),
}
NO_GATES = {
    "maximum": lambda gate, x: x * gate.excite(x.amax((2, 3), keepdim=True)),
    "rows": lambda gate, x: x * gate.excite(x.mean(2, keepdim=True)),
    "spatial": lambda gate, x: x * x.mean(1, keepdim=True).sigmoid(),
    "itself": lambda gate, x: x * x.sigmoid(),
    "size": lambda gate, x: x * (gate.excite(x.mean((2, 3), keepdim=True)) * x.size(2)),
    "norm-of-gate": lambda gate, x: x * (
        (p := gate.down(x.mean((2, 3), keepdim=True)).relu().mean(1, keepdim=True))
        - p.mean((2, 3), keepdim=True) + x.amax((2, 3), keepdim=True)
    ),
    "first-image": lambda gate, x: (
        x * torch.sigmoid(x.mean((2, 3), keepdim=True) + x[0].amax((1, 2)).view(1, -1, 1, 1))
    ),
    "read-again": lambda gate, x: x * (s := gate.excite(x.mean((2, 3), keepdim=True))) + s,
}  # fmt: skip


class TestGates:
    @pytest.mark.parametrize("name", GATES)
    def test_factors_from_means_are_one(self, name):
        model = randomize(Gated(Gate(GATES[name])))
        assert fused(fuse(model)) == {
            "(model)": "Gated: conv norm relu conv norm gate + x relu"
        }
        assert_same_mathematics(model, image())

    @pytest.mark.parametrize("name", NO_GATES)
    def test_others_are_none(self, name):
        model = randomize(Gated(Gate(NO_GATES[name])))
        assert not any(" gate" in what for what in fused(fuse(model)).values())
        assert_same_mathematics(model, image())

    def test_hooks_in_a_gate_run_and_a_hook_on_it_sees_its_result(self):
        plain = randomize(Gated(Gate(GATES["mean"]))).eval()
        model, x, seen = fuse(copy.deepcopy(plain)), image(), []
        for one in (plain, model):
            one.gate.up.register_forward_hook(lambda m, args, y: seen.append(y))
        close(model(x), plain(x))
        close(*seen)
        for one in (plain, model):
            one.gate.register_forward_hook(lambda m, args, y: (seen.append(y), 2 * y)[1])
        close(model(x), plain(x))
        close(seen[3], seen[5])

    def test_its_norm_may_have_another_mode(self):
        plain = randomize(Gated(Gate(GATES["mean"])))
        plain.bn2.eval()
        model = fuse(copy.deepcopy(plain))
        close(model(image()), plain(image()))
        close(dict(model.named_buffers()), dict(plain.named_buffers()))


class Pooling(Basic):
    """Squeeze-and-excitation whose means come from a module."""

    def __init__(self):
        super().__init__(4, 4)
        self.pool, self.fc, self.side = nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Identity()

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out = out * torch.sigmoid(self.fc(self.pool(out)))
        return self.relu(out + self.side(x))


class Draws(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Chosen(nn.Module):
    def forward(self, values):
        return values[0]


class TestWhatAGateCalls:
    def test_may_take_a_list(self):
        class Listing(Pooling):
            def __init__(self):
                super().__init__()
                self.choose = Chosen()

            def forward(self, x):
                out = self.bn1(self.conv1(x))
                out = out * torch.sigmoid(self.choose([self.fc(self.pool(out))]))
                return self.relu(out + x)

        model = randomize(Listing())
        assert "gate" in str(fused(fuse(model)))
        assert_same_mathematics(model, image())

    @pytest.mark.parametrize("change", [
        lambda net: net.pool.register_forward_hook(lambda m, args, y: 2 * y) and None,
        lambda net: setattr(net, "pool", nn.AdaptiveMaxPool2d(1)),
        lambda net: setattr(net.pool, "forward", lambda v: v.amax((2, 3), keepdim=True)),
        lambda net: setattr(net.conv1, "bias", nn.Parameter(torch.ones(4).double())),
        lambda net: setattr(net, "fc", nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1).double())),
    ])  # fmt: skip
    def test_may_be_changed_later(self, change):
        plain = randomize(Pooling()).eval()
        model, x = fuse(copy.deepcopy(plain)), image()
        assert "gate" in str(fused(model))
        for one in (plain, model):
            torch.manual_seed(0)
            change(one)
        close(model(x), plain(x))

    def test_random_numbers_are_drawn_in_order(self):
        plain = randomize(Pooling())
        plain.fc, plain.side = nn.Sequential(Draws(), plain.fc), Draws()
        model = fuse(copy.deepcopy(plain))
        for mode in (True, False):
            for one in (plain, model):
                one.train(mode)
            torch.manual_seed(0)
            expected = plain(image())
            torch.manual_seed(0)
            close(model(image()), expected)

    @pytest.mark.parametrize("gate", [
        lambda net, u: torch.sigmoid(net.bn1(net.pool(u))),
        lambda net, u: torch.sigmoid(net.pool(u) - net.bn1.running_mean.view(1, -1, 1, 1)),
    ])  # fmt: skip
    def test_may_be_the_norm_before_it(self, gate):
        class Reading(Pooling):
            def forward(self, x):
                out = self.bn1(self.conv1(x))
                return self.relu(out * gate(self, out) + x)

        assert_same_mathematics(randomize(Reading()), image())


class Further(nn.Module):
    """A block with a further argument, which its caller passes."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x, shortcut=None, scale=1):
        return F.relu(self.bn(self.conv(x)) + (x if shortcut is None else shortcut)) * scale


class Joined(nn.Module):
    """A list of tensors in; with `change` it writes to that list."""

    def __init__(self, change=False):
        super().__init__()
        self.conv, self.bn, self.change = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), change

    def forward(self, features):
        y = F.relu(self.bn(self.conv(torch.cat(features, 1))))
        if self.change:
            features[0] = y
        return y


class Calls(nn.Module):
    def __init__(self, child, call):
        super().__init__()
        self.child, self.call = child, call

    def forward(self, x):
        return self.call(self.child, x)


def written(child, x):
    features = [x, x * 2]
    return child(features) + features[0]


CALLS = {
    "list": (Joined, lambda child, x: child([x, x * 2])),
    "tuple": (Joined, lambda child, x: child((x, x * 2))),
    "value": (Further, lambda child, x: child(x, x * 2)),
    "none": (Further, lambda child, x: child(x, None)),
    "number": (Further, lambda child, x: child(x, x * 2, 3)),
}


class TestCalls:
    @pytest.mark.parametrize("name", CALLS)
    def test_arguments_as_the_caller_passes_them(self, name, fused_calls):
        make, call = CALLS[name]
        model = randomize(Calls(make(), call))
        fuse(model)(image())
        assert len(fused_calls) == 1
        assert_same_mathematics(model, image())

    def test_arguments_are_those_of_the_pickled_module_too(self, fused_calls):
        child = fuse(randomize(Calls(Joined(), CALLS["list"][1]))).child
        other, given = pickle.loads(pickle.dumps(child)).eval(), [image(), image()]
        assert type(other) is type(child)
        close(other(given), unfuse(child).eval()(given))
        assert len(fused_calls) == 1

    @pytest.mark.parametrize(
        "call", [lambda child, x: child(x, shortcut=x), lambda child, x: child(x, scale=2)]
    )
    def test_keywords_run_the_original(self, call, fused_calls):
        model = randomize(Calls(Further(), call))
        assert "with arguments that a fused forward does not" in str(explain(fuse(model)))
        assert_same_mathematics(model, image())
        assert fused_calls == []

    def test_a_list_that_is_changed_is_left_alone(self, fused_calls):
        model = randomize(Calls(Joined(change=True), written))
        assert "it changes a list that it is given" in str(explain(fuse(model)))
        assert_same_mathematics(model, image())
        assert fused_calls == []

    def test_other_arguments_than_were_traced_run_the_original(self):
        model = fuse(randomize(Calls(Joined(), CALLS["list"][1]))).eval()
        plain, x = unfuse(model), image()
        close(model.child((x, x * 2)), plain.child((x, x * 2)))
        close(model.child([x, x[:, :2], x[:, :2]]), plain.child([x, x[:, :2], x[:, :2]]))
        with pytest.raises(TypeError):
            model.child(3)


class Keeping(nn.Module):
    """Changes or returns the list that it is given, but calls nothing fusible."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, features):
        if self.how == "append":
            features.append(features[0] * 3)
        return features if self.how == "return" else features[0]


class TestLists:
    def test_that_a_child_changes_are_an_error(self):
        class Parent(Basic):
            def __init__(self):
                super().__init__(4, 4)
                self.child = Keeping("append")

            def forward(self, x):
                features = [self.relu(self.bn1(self.conv1(x))), x]
                self.child(features)
                return features[-1] + features[0]

        with pytest.raises(RuntimeError, match="Keeping changes a list that it is given"):
            fuse(randomize(Parent()))(image())

    def test_that_a_child_returns_are_the_same_object(self):
        class Parent(nn.Module):
            def __init__(self):
                super().__init__()
                self.child = Keeping("return")

            def forward(self, x):
                features = [x, x * 2]
                return x * 2 if self.child(features) is features else x * 3

        assert_same_mathematics(Parent(), image())

    def test_one_tensor_twice_is_two_arguments(self, fused_calls):
        model = randomize(Calls(Joined(), lambda child, x: child([x, x])))
        fuse(model)(image())
        assert len(fused_calls) == 1
        assert_same_mathematics(model, image())

    def test_unless_a_forward_asks(self):
        class Asking(Joined):
            def forward(self, features):
                y = super().forward(features)
                return y * 2 if features[0] is features[1] else y

        model = randomize(Calls(Asking(), lambda child, x: child([x, x])))
        assert "whether two values are one object" in str(explain(fuse(model)))
        assert_same_mathematics(model, image())

    @pytest.mark.parametrize("values", [(0.0, -0.0), (1, True), (1, 1.0)])
    def test_values_that_are_equal_but_not_the_same(self, values):
        class Child(Further):
            def forward(self, x, k):
                scale = math.copysign(1.0, k) * (2 if type(k) is int else 3)
                return F.relu(self.bn(self.conv(x))) * scale

        class Parent(nn.Module):
            def __init__(self):
                super().__init__()
                self.child = Child()

            def forward(self, x):
                return self.child(self.child(x, values[0]), values[1])

        assert_same_mathematics(randomize(Parent()), image())

    def test_a_child_called_in_two_ways_says_so(self):
        class Parent(nn.Module):
            def __init__(self):
                super().__init__()
                self.child = Further()

            def forward(self, x):
                return self.child(self.child(x), x, 2)

        model = randomize(Parent())
        assert "in some of its calls" in str(explain(fuse(model)))
        assert_same_mathematics(model, image())


class WithoutNorms(nn.Module):
    """Convolutions with a bias and no norm: alone, with a ReLU, with an addition, with both."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(6))
        self.side = nn.Conv2d(32, 32, 1)

    def forward(self, x):
        first, second, third, fourth, fifth, last = self.convs
        h = F.relu(first(x))
        h = third(F.relu(second(h))) + h
        h = F.relu(fourth(h) + x.sin())
        return last(F.relu(fifth(h) + self.side(h)))


class TestWithoutNorms:
    def test_biases_run_in_the_convolution(self, fused_calls):
        model = randomize(WithoutNorms())
        assert fused(fuse(model)) == {
            "convs.0": "conv relu",
            "convs.1": "conv relu",
            "convs.2": "conv + residual",
            "convs.3": "conv + residual relu",
            "convs.4": "conv + conv(x) relu",
            "convs.5": "conv",
        }
        assert_same_mathematics(model, image(32))
        assert len(fused_calls) > 0

    def test_a_bias_may_come_and_go(self, fused_calls):
        plain = randomize(WithoutNorms())
        model = fuse(copy.deepcopy(plain), inplace=True)
        for changed in (plain, model):
            changed.convs[0].bias, changed.convs[4].bias = None, None
        close(model(image(32)), plain(image(32)))
        assert len(fused_calls) == 6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_under_autocast_and_in_bf16(self, dtype):
        plain = randomize(WithoutNorms()).to(dtype)
        model, x = fuse(plain), image(32, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            actual, expected = model(x), plain(x)
        assert actual.dtype == expected.dtype == torch.bfloat16
        exact = copy.deepcopy(plain).double()(x.double())
        assert (actual - exact).abs().max() <= 3 * (expected - exact).abs().max()

    def test_a_convolution_after_a_norm_and_a_relu_after_it(self):
        model = randomize(nn.Sequential(
            nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.BatchNorm2d(32),
        ))  # fmt: skip
        assert fused(fuse(model)) == {"0": "norm relu conv relu"}
        assert_same_mathematics(model, image(32))

    def test_a_result_changed_in_place_is_an_error_in_training_as_in_pytorch(self):
        plain = randomize(nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU()))
        for model in (plain, fuse(plain)):
            y = model(image(32).requires_grad_())
            y.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()

    def test_they_may_need_no_gradient(self):
        plain = randomize(nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)))
        for names in (["0.bias"], ["0.weight", "2.bias"], ["2.bias"], ["2.weight"]):
            for name, parameter in plain.named_parameters():
                parameter.requires_grad_(name in names)
            assert_same_mathematics(plain, image(32))

    def test_a_bias_that_is_no_parameter(self, fused_calls):
        plain = randomize(WithoutNorms()).eval()
        model = fuse(copy.deepcopy(plain))
        for changed in (plain, model):
            for conv in (changed.convs[0], changed.side):
                del conv._parameters["bias"]
                conv.register_buffer("bias", torch.full((32,), 5.0, dtype=torch.float64))
        with torch.no_grad():
            close(model(image(32)), plain(image(32)))
        assert len(fused_calls) == 6

    def test_need_channels_in_multiples_of_32(self):
        """Or a few, as a network's first convolution has; other tiles there are not."""
        def sizes(*channels, **options):
            net = nn.Sequential(nn.Conv2d(*channels, 3, **options), nn.ReLU())
            return list(fused(fuse(net)).values())

        assert sizes(32, 64) == sizes(3, 32) == sizes(64, 64, groups=8) == ["Sequential: conv relu"]
        assert sizes(32, 48) == sizes(48, 32) == sizes(32, 32, groups=32) == []

    def test_one_gradient_at_a_time(self):
        net = fuse(randomize(nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU())))
        x = image(32).requires_grad_()
        y = net(x)
        with pytest.raises(RuntimeError, match="one gradient at a time, not is_grads_batched=True"):
            torch.autograd.grad(y, x, torch.stack([y, y]), is_grads_batched=True)


class Between(nn.Module):
    """An addition whose operand is changed before the ReLU after it."""

    def __init__(self):
        super().__init__()
        self.conv, self.side = unit(nn.BatchNorm2d(4))[:2], nn.Conv2d(4, 4, 1)

    def forward(self, x):
        r = self.side(x)
        y = self.conv(x) + r
        r.mul_(2)
        return F.relu(y) + r


class Beside(nn.Module):
    """A norm, and convolutions of the same input beside it."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.unit = unit(nn.BatchNorm2d(4))[:2]

    def forward(self, x):
        y = self.norm(x) + self.conv(x)
        return F.relu(self.unit(y) + self.norm(y))


class Added(nn.Module):
    """Adds in place to a value of another dtype than the result."""

    def __init__(self, reverse=False):
        super().__init__()
        self.conv, self.reverse = unit(nn.BatchNorm2d(4))[:2], reverse

    def forward(self, x):
        y = self.conv(x)
        if self.reverse:
            z = x.sin()
            z += y
            return z
        y += x
        return y


class TestAdditions:
    @pytest.mark.parametrize("make", [Between, Beside])
    def test_compute_what_plain_computes(self, make):
        assert_same_mathematics(randomize(make()), image())

    @pytest.mark.parametrize("reverse", [False, True])
    def test_in_place_keep_the_dtype(self, reverse):
        plain = Added(reverse).eval()
        model, x = fuse(plain), image(dtype=torch.float32)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == plain(x).dtype == (torch.bfloat16, torch.float32)[reverse]

    def test_of_complex_values(self):
        class Complex(Added):
            def forward(self, x):
                return self.conv(x) + x.to(torch.complex128)

        plain = randomize(Complex()).eval()
        close(fuse(plain)(image()), plain(image()))

    def test_in_a_gate(self):
        def gate(self, x):
            p = x.mean((2, 3), keepdim=True)
            return x * torch.sigmoid(self.down(p).relu().mean(1, keepdim=True) + p)

        model = randomize(Gated(Gate(gate)))
        assert fused(fuse(model)) == {"(model)": "Gated: conv norm relu conv norm gate + x relu"}
        assert_same_mathematics(model, image())


class TestChains:
    def test_two_convolutions_have_no_relu_between_them(self):
        model = randomize(nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1, bias=False),
            nn.BatchNorm2d(4), nn.ReLU(),
        ))  # fmt: skip
        assert fused(fuse(model)) == {"1": "conv norm relu"}
        assert_same_mathematics(model, image())

    @pytest.mark.parametrize("impl", ["auto", "reference"])
    def test_nor_in_a_chain_by_its_parts(self, impl):
        net = randomize(Basic(4, 4)).eval()
        parts = Parts((net.conv1, net.conv2), (None, None, net.bn2), False, "none")
        with torch.no_grad():
            expected = net.bn2(net.conv2(net.conv1(image())))
            close(run_fused(parts, image(), impl=impl), expected)


class Switching(fx.GraphModule):
    """As torchvision's feature extractors: another graph in each mode."""

    def __init__(self, root, training, evaluation):
        super().__init__(root, training)
        self.graphs = {True: training, False: evaluation}

    def train(self, mode=True):
        self.graph = self.graphs[mode]
        return super().train(mode)


class TestValues:
    """What a region reads besides its layers."""

    @pytest.mark.parametrize("add", [
        lambda net, x: F.relu(net.bn1(net.conv1(x)) + net.pos), lambda net, x: F.relu(x + net.pos),
        lambda net, x: net.bn1(net.conv1(net.pos)) + x,
        lambda net, x: torch.relu(input=net.pos + x),
        lambda net, x: F.relu(net.bn1(net.conv1(x)) + net.row), lambda net, x: F.relu(x + 1.5),
        lambda net, x: F.relu(net.bn1(net.conv1(x)) + x.mean()),
    ])  # fmt: skip
    def test_may_be_parameters_numbers_or_of_other_shapes(self, add):
        class Net(Basic):
            def __init__(self):
                super().__init__(4, 4)
                self.pos = nn.Parameter(torch.randn(2, 4, 8, 8))
                self.row = nn.Parameter(torch.randn(4, 1, 8))

            def forward(self, x):
                return add(self, x) * 1.0

        assert_same_mathematics(randomize(Net()), image())

    def test_integers_are_left_to_pytorch(self):
        class Sum(nn.Module):
            def __init__(self):
                super().__init__()
                self.relu = nn.ReLU()

            def forward(self, x):
                return self.relu(x + x.flip(3))

        x = torch.arange(-8, 8).view(1, 1, 4, 4)
        assert torch.equal(fuse(Sum())(x), Sum()(x))

    @pytest.mark.slow
    def test_compiles_though_a_shortcut_runs_in_between(self):
        class Pooled(Basic):
            def __init__(self):
                super().__init__(4, 4)
                self.downsample = nn.AvgPool2d(1)

            def forward(self, x):
                out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
                return self.relu(out + self.downsample(x))

        model = fuse(randomize(Pooled())).eval()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        close(compiled(image()), unfuse(model)(image()))


class TestGraphs:
    def test_a_graph_is_fused_as_it_is(self):
        model = fx.symbolic_trace(randomize(ResNet()))
        shares = explain(fuse(model)).shares["training"]
        assert all(share.fused == share.all > 0 for share in shares.values())
        assert_same_mathematics(model, image(3, 16))

    def test_follows_another_graph_in_each_mode(self, fused_calls):
        net, x, both = randomize(ResNet()), image(3, 16), []
        for one in (net, copy.deepcopy(net)):
            training, evaluation = (fx.Tracer().trace(one) for _ in range(2))
            with evaluation.inserting_before(last := list(evaluation.nodes)[-1]):
                last.args = (evaluation.call_function(torch.neg, (last.args[0],)),)
            both.append(Switching(one, training, evaluation))
        plain, model = both[0], fuse(both[1])
        for mode in (True, False, True):
            fused_calls.clear()
            close(model.train(mode)(x), plain.train(mode)(x))
            assert len(fused_calls) == 5

    def test_recompiled_it_computes_the_new_graph(self):
        model = fuse(fx.symbolic_trace(randomize(Basic(4, 4)))).eval()
        x = image()
        before = model(x)
        output = list(model.graph.nodes)[-1]
        with model.graph.inserting_before(output):
            output.args = (model.graph.call_function(torch.neg, (output.args[0],)),)
        assert "call recompile()" in explain(model).rows[0].why
        model.recompile()
        close(model(x), -before)
        assert explain(model).rows[0].state == "fused"
        close(unfuse(model)(x), -before)

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_and_pickles_are_fused(self, again):
        model = fuse(fx.symbolic_trace(randomize(Basic(4, 4))), impl="reference").eval()
        other = again(model)
        assert [*fused(other)] == [*fused(model)] == ["(model)"]
        close(other(image()), model(image()))
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}

    @pytest.mark.slow
    def test_an_exported_program_is_fused(self):
        plain = randomize(ResNet()).eval()
        x = image(3, 16)
        program = torch.export.export(plain, (x,)).module()
        model = fuse(program)
        shares = explain(model).shares["evaluation"]
        assert all(share.fused == share.all > 0 for share in shares.values())
        close(model(x), plain(x))
        close(copy.deepcopy(model)(x), plain(x))

    def test_ordered_dicts_of_features_keep_the_stem_fused(self):
        class Features(nn.ModuleDict):
            def forward(self, x):
                found = OrderedDict()
                for name, module in self.items():
                    x = module(x)
                    found[name] = x
                return found

        net = randomize(Basic(4, 4))
        names = ("conv1", "bn1", "relu", "conv2")
        model = fuse(Features({name: getattr(net, name) for name in names}).eval())
        found = model(image())
        assert type(found) is OrderedDict and list(found) == list(names)
        close(found["conv1"], net.conv1(image()))


class Aliased(Basic):
    """Adds in place to what a child returns, which may be the child's input."""

    def __init__(self, child):
        super().__init__(4, 4)
        self.child = child

    def forward(self, x):
        out = self.child(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out += x
        return self.relu(out)


class TestInPlace:
    @pytest.mark.parametrize("child", [nn.Dropout, nn.Identity, lambda: nn.AvgPool2d(1)])
    def test_an_addition_to_the_result_of_a_child_is_fused(self, child):
        model = randomize(Aliased(child())).eval()
        plain, model = copy.deepcopy(model), fuse(model)
        assert "relu" in str(fused(model))
        close(model(image()), plain(image()))

    def test_and_a_hook_on_the_child_sees_it(self):
        plain = randomize(Aliased(nn.AvgPool2d(1))).eval()
        model, seen = fuse(copy.deepcopy(plain)), []
        for one in (plain, model):
            one.child.register_forward_hook(lambda m, args, y: seen.append(y))
        with torch.no_grad():
            close(model(image()), plain(image()))
        close(*seen)

    def test_an_addition_to_the_caller_s_tensor_changes_it(self):
        class Into(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
                self.drop = nn.Dropout(0.5)

            def forward(self, x):
                out = self.bn(self.conv(x))
                y = self.drop(x)
                y += out
                return F.relu(y)

        plain = randomize(Into()).eval()
        model, given = fuse(plain), [image(), image()]
        with torch.no_grad():
            close(model(given[0]), plain(given[1]))
        close(*given)
        assert not torch.equal(given[0], image())

    def test_a_change_of_an_alias_between_the_layers_is_seen(self):
        class Alias(Basic):
            def forward(self, x):
                view = x[:]
                out = self.conv1(x)
                view.add_(1.0)
                return self.relu(self.bn1(out) + view)

        plain = randomize(Alias(4, 4)).eval()
        model = fuse(plain)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                close(model(image()), plain(image()))

    @pytest.mark.parametrize("training", [True, False])
    def test_a_norm_called_twice_keeps_its_order(self, training):
        class Shared(Basic):
            def forward(self, x):
                h = self.conv1(self.relu(self.bn1(x)))
                z = self.bn1(x * 3) * 2
                return self.relu(self.bn2(h) + z)

        model = randomize(Shared(4, 4)).train(training)
        plain, model = copy.deepcopy(model), fuse(model)
        close(model(image()), plain(image()))
        close(dict(model.named_buffers()), dict(plain.named_buffers()))
        assert_same_mathematics(plain, image())

    def test_a_change_between_the_layers_of_a_region_is_an_error(self):
        class Changing(nn.Module):
            def forward(self, x):
                return x.add_(1.0)

        class Between(Basic):
            def __init__(self):
                super().__init__(4, 4)
                self.change = Changing()

            def forward(self, x):
                out = self.conv1(x)
                shortcut = self.change(x)
                return self.relu(self.bn1(out) + shortcut)

        model = fuse(randomize(Between())).eval()
        with torch.no_grad(), pytest.raises(RuntimeError, match="is changed in place after"):
            model(image())


class TestTransforms:
    """An addition and a ReLU function have no layer, so nothing else says that a call is plain."""

    def test_of_an_addition_alone(self, fused_calls):
        class Sum(nn.Module):
            def forward(self, x):
                return F.relu(x * 2 + x.flip(3))

        model, x = fuse(Sum()), image()
        _, tangent = torch.func.jvp(model, (x,), (x.cos(),))
        close(tangent, torch.func.jvp(Sum(), (x,), (x.cos(),))[1])
        close(torch.func.vmap(model)(x[:, None]), torch.func.vmap(Sum())(x[:, None]))
        handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
        close(model(x), Sum()(x))
        handle.remove()
        assert fused_calls == []
        close(model(x), Sum()(x))
        assert len(fused_calls) == 1


class Derived(nn.Conv2d):
    """Its forward is PyTorch's, which reads its attributes."""

    def forward(self, x):
        return super().forward(x)


class TestReads:
    @pytest.mark.parametrize("change", [{"stride": (2, 2)}, {"dilation": (2, 2)}, {"groups": 4}])
    def test_of_a_layer_s_own_forward_are_watched(self, change):
        plain = nn.Sequential(Derived(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        model = fuse(copy.deepcopy(randomize(plain)))
        for one in (plain, model):
            for name, value in change.items():
                setattr(one[0], name, value)
            if "groups" in change:
                one[0].weight = nn.Parameter(plain[0].weight.detach()[:, :1].clone())
        close(model(image()), plain(image()))
        assert_same_mathematics(plain, image())

    @pytest.mark.parametrize("change", [
        lambda net: setattr(net.options, "act", False), lambda net: net.requires_grad_(False),
    ])  # fmt: skip
    def test_of_an_object_and_of_all_parameters_are_watched(self, change):
        class Options:
            act = True

            def __init__(self):
                self.act = True

        class Deciding(Basic):
            def __init__(self):
                super().__init__(4, 4)
                self.options = Options()

            def forward(self, x):
                y = super().forward(x)
                trains = all(p.requires_grad for p in self.parameters())
                return y if self.options.act and trains else y * 2

        plain = randomize(Deciding()).eval()
        model = fuse(copy.deepcopy(plain))
        assert fused(model)
        close(model(image()), plain(image()))
        change(plain), change(model)
        close(model(image()), plain(image()))
        assert "fused" not in {row.state for row in explain(model).rows}


def test_children_of_a_module_that_is_called_with_keywords_run_fused(fused_calls):
    """Its own forward runs plain, so what it opens for itself is fused where it is."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = unit(nn.BatchNorm2d(4)), unit(nn.BatchNorm2d(4))

        def forward(self, x, skip=None):
            y = self.second(self.first(x))
            return y if skip is None else y + skip

    model = randomize(Calls(Block(), lambda child, x: child(x, skip=x)))
    whole = {f"child.{name}": "Sequential: conv norm relu" for name in ("first", "second")}
    assert fused(fuse(model)) == whole
    fuse(model)(image())
    assert len(fused_calls) == 2
    assert explain(fuse(model)).shares["training"]["convolutions"] == (2, 2, 2)
    assert_same_mathematics(model, image())
