"""fuse, unfuse, explain: models built elsewhere, recognized by structure; what is left alone."""

import copy
import importlib
import io
import pickle
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import twins
from foreign_models import BASIC, CALLED, LEFT_ALONE, MODELS, RUNS, Basic, ResNet, vgg
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import resnet_fast
from resnet_fast import blocks, modules
from resnet_fast.dispatch import backends
from resnet_fast.fusion import rewrite
from resnet_fast.fusion.api import explain, fuse, unfuse


def randomize(model):
    return twins.randomize(model).double()


def close(actual, expected):
    """Both ran in fp64 and do the same sums in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def results(model, x):
    """Of a training step and an evaluation: outputs, gradients, running statistics."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    model.train()
    y = model(x * 1.0)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    state = {name: b.clone() for name, b in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        return {"training": y, "x": x.grad, "evaluation": model(x), **gradients, **state}


def assert_same_mathematics(model, x, **options):
    plain = copy.deepcopy(model)
    close(results(fuse(model, **options), x), results(plain, x))


def fused(model):
    """What `explain` says is fused, by path."""
    return {row.path: row.what for row in explain(model).rows if row.state == "fused"}


def why(model, path):
    (row,) = (row for row in explain(model).rows if row.path == path)
    return f"{row.state}: {row.why}"


def wrapped(function):
    def call(self, x):
        return function(self, x)

    return call


class Wrapped(Basic):
    """Its forward cannot be found by its name."""

    forward = wrapped(Basic.forward)


class Named(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Fields:
    first: torch.Tensor
    second: torch.Tensor


class Output(OrderedDict):
    """As Hugging Face's models give results."""


RESULTS = {  # how a forward may give two tensors
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"a": a, "b": b},
    "ordered-dict": lambda a, b: OrderedDict(a=a, b=b),
    "own-dict": lambda a, b: Output(a=a, b=b),
    "named-tuple": Named,
    "dataclass": Fields,
}


def values_of(result):
    if isinstance(result, Fields):
        return [result.first, result.second]
    return result.values() if isinstance(result, dict) else result


STEM_EDITS = {
    "relu-silu": lambda net: setattr(net, "relu", nn.SiLU()),
    "relu-identity": lambda net: setattr(net, "relu", nn.Identity()),
    "norm-group-norm": lambda net: setattr(net, "bn1", nn.GroupNorm(2, 4).double()),
    "norm-sync": lambda net: nn.SyncBatchNorm.convert_sync_batchnorm(net),
    "pool-identity": lambda net: setattr(net, "maxpool", nn.Identity()),
    "pool-ceil": lambda net: setattr(net.maxpool, "ceil_mode", True),
    "pool-average": lambda net: setattr(net, "maxpool", nn.AvgPool2d(2)),
    "conv-forward": lambda net: setattr(net.conv1, "forward", lambda x: x[:, [0, 1, 2, 0]]),
}


@pytest.fixture
def net():
    return randomize(ResNet())


IMAGE = (2, 3, 16, 16)


class TestWhatIsFused:
    @pytest.mark.parametrize("name", MODELS)
    def test_is_found_by_structure(self, name):
        build, _, expected = MODELS[name]
        assert fused(fuse(build())) == expected

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.leave_out(
        cases=lambda case: case.impl.interpreted and case.name not in ("preact", "vgg")
    )
    def test_computes_the_same(self, name, impl):
        impl.need(torch.float64)
        build, shape, _ = MODELS[name]
        model = randomize(build()).to(impl.device)
        x = torch.randn(shape, dtype=torch.float64, device=impl.device)
        assert_same_mathematics(model, x, impl=impl.name)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["resnet", "dense", "vgg"])
    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    def test_compiles_in_one_graph(self, name, training):
        build, shape, _ = MODELS[name]
        model = fuse(randomize(build())).train(training)
        plain = unfuse(copy.deepcopy(model))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = torch.randn(shape, dtype=torch.float64)
        close(compiled(x), plain(x))
        close(dict(model.named_buffers()), dict(plain.named_buffers()))

    def test_statistics_follow_each_norm_s_own_mode(self, net):
        net.layer1[0].bn1.eval()
        net.bn1.eval()
        plain, x = copy.deepcopy(net), torch.randn(IMAGE, dtype=torch.float64)
        model = fuse(net)
        close(model(x), plain(x))
        close(dict(model.named_buffers()), dict(plain.named_buffers()))

    def test_a_norm_of_any_dimensions_is_fused_for_four(self):
        """SyncBatchNorm is PyTorch's for all inputs: what was BatchNorm1d stays right."""

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.relu = nn.SyncBatchNorm(4), nn.ReLU()

            def forward(self, x):
                return self.relu(self.norm(x))

        class Run(Block):
            def forward(self, x):
                return 2 * super().forward(x)

        for model in (Block(), Run(), nn.Sequential(nn.SyncBatchNorm(4), nn.ReLU())):
            randomize(model)
            assert "norm relu" in str(fused(fuse(model)))
            for shape in ((3, 4), (3, 4, 5), (2, 4, 3, 3), (2, 4, 3, 3, 2)):
                assert_same_mathematics(copy.deepcopy(model), torch.randn(shape).double())

    def test_an_argument_beyond_the_traced_one_runs_the_original(self, net):
        class Scaled(Basic):
            def forward(self, x, scale=None):
                y = super().forward(x)
                return y if scale is None else y * scale

        block = fuse(randomize(Scaled(4, 4)).eval())
        x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
        assert fused(block)
        close(block(x, 2.0), 2 * block(x))
        close(block(x=x), block(x))

    @pytest.mark.parametrize("made", RESULTS)
    def test_results_keep_their_types(self, made):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.block, self.conv, self.bn = Basic(4, 4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

            def forward(self, x):
                h = self.block(x)
                return RESULTS[made](h, self.bn(self.conv(h)))

        plain = randomize(Two()).eval()
        model, x = fuse(plain), torch.randn(2, 4, 8, 8, dtype=torch.float64)
        assert "block" in fused(model)
        actual, expected = model(x), plain(x)
        assert type(actual) is type(expected)
        for one, other in zip(values_of(actual), values_of(expected), strict=True):
            close(one, other)

    def test_a_block_registered_twice_is_fused_once_for_both(self):
        block = Basic(4, 4)
        model = randomize(nn.Sequential(block, block))
        assert fused(fuse(model)) == {"0": f"Basic: {BASIC} + x relu"}
        assert_same_mathematics(model, torch.randn(2, 4, 8, 8, dtype=torch.float64))

    @pytest.mark.parametrize("source", ["torchvision", "timm"])
    def test_the_real_ones(self, source):
        try:
            package = importlib.import_module(source)
        except Exception as error:  # absent, or built for another torch
            pytest.skip(f"{source}: {error}")
        create = package.create_model if source == "timm" else package.models.get_model
        for name, blocks_in_it in {"resnet18": 8, "resnet50": 16}.items():
            model = randomize(create(name, num_classes=5))
            rows = explain(model).rows
            assert [row.state for row in rows] == ["fusible"] * (1 + blocks_in_it)
            assert_same_mathematics(model, torch.randn(2, 3, 64, 64, dtype=torch.float64))


class TestWhatIsLeftAlone:
    @pytest.mark.parametrize("name", LEFT_ALONE)
    def test_with_a_reason(self, name):
        build, path, reason = LEFT_ALONE[name]
        model = build()
        rows = [row for row in explain(fuse(model)).rows if row.path == path]
        assert any(row.state == "left alone" and reason in row.why for row in rows)

    @pytest.mark.parametrize("name", RUNS)
    def test_still_computes_the_same(self, name):
        model = LEFT_ALONE[name][0]().double()
        channels = 1 if name == "broadcasting" else 4
        x = torch.randn(2, channels, 8, 8, dtype=torch.float64)
        assert_same_mathematics(model, x)

    def test_tracing_leaves_nothing_on_the_modules(self):
        class Remembers(Basic):
            def forward(self, x):
                self.last = x
                return super().forward(x)

        model = Remembers(4, 4).eval()
        model.bn1.train()
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        explain(model)
        assert before == {name: dict(vars(module)) for name, module in model.named_modules()}


class TestHooks:
    def test_of_a_fused_module_run(self, net):
        seen = []
        net.layer1[0].register_forward_hook(lambda m, args, y: seen.append(y.shape))
        model = fuse(net)
        assert "layer1.0" in fused(model)
        model(torch.randn(IMAGE, dtype=torch.float64))
        assert seen == [(2, 4, 4, 4)]

    @pytest.mark.parametrize("name", ["conv1", "bn2", "relu", "downsample", "downsample.0"])
    def test_on_a_child_of_a_block_run_though_they_came_later(self, net, name):
        plain, model, x = copy.deepcopy(net), fuse(net), torch.randn(IMAGE, dtype=torch.float64)
        seen = []
        child = model.layer2[0].get_submodule(name)
        handle = child.register_forward_hook(lambda m, args, y: seen.append(y.shape))
        close(model(x), plain(x))
        assert len(seen) == (2 if name == "relu" else 1)
        rows = explain(model).rows
        assert not any(row.state == "fused" and row.path.startswith("layer2.0") for row in rows)
        if name != "downsample":  # its children run fused, and it is called
            assert "it has hooks" in why(model, f"layer2.0.{name}")
        handle.remove()
        assert why(model, "layer2.0") == "fused: "

    def test_in_a_sequential_run_though_they_came_later(self):
        model = randomize(vgg())
        plain, model = copy.deepcopy(model), fuse(model)
        x, seen = torch.randn(2, 3, 8, 8, dtype=torch.float64), []
        model[1].register_forward_hook(lambda m, args, y: seen.append(y))
        close(model(x), plain(x))
        close(seen, [plain[1](plain[0](x))])

    def test_on_the_convolution_of_a_run_see_its_own_result(self, net):
        plain, model, x = copy.deepcopy(net), fuse(net), torch.randn(IMAGE, dtype=torch.float64)
        seen = []
        model.conv1.register_forward_hook(lambda m, args, y: seen.append(y))
        close(model(x), plain(x))
        close(seen, [plain.conv1(x)])


class TestSharing:
    def test_a_fused_copy_has_the_same_tensors_under_the_same_keys(self, net):
        model = fuse(net)
        assert list(model.state_dict()) == list(net.state_dict())
        assert model is not net and fused(net) == {}
        for (name, ours), (_, theirs) in zip(
            [*model.named_parameters(), *model.named_buffers()],
            [*net.named_parameters(), *net.named_buffers()],
            strict=True,
        ):
            assert ours is theirs, name
            assert ours.data_ptr() == theirs.data_ptr()

    def test_in_place_every_module_stays_the_object_it_was(self, net):
        before = dict(net.named_modules())
        assert fuse(net, inplace=True) is net
        assert dict(net.named_modules()) == before
        assert isinstance(net.layer1[0], Basic) and isinstance(net.conv1, nn.Conv2d)
        assert unfuse(net, inplace=True) is net
        assert dict(net.named_modules()) == before

    def test_unfuse_gives_every_class_and_attribute_back(self, net):
        before = {name: (type(m), dict(vars(m))) for name, m in net.named_modules()}
        unfuse(fuse(net, inplace=True), inplace=True)
        assert {name: (type(m), dict(vars(m))) for name, m in net.named_modules()} == before
        model = fuse(net)
        assert type(unfuse(model)) is ResNet and fused(unfuse(model)) == {}
        assert fused(model) == MODELS["resnet"][2]

    def test_fusing_again_is_fusing_once(self, net):
        once = fuse(net)
        twice = fuse(once, impl="reference")
        assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
        assert "impl='reference'" in repr(twice.layer1[0]) and "impl='auto'" in repr(once.layer1[0])

    def test_modes_and_requires_grad_stay(self, net):
        net.eval()
        net.layer1.train()
        net.conv1.requires_grad_(False)
        model = fuse(net)
        assert [m.training for m in model.modules()] == [m.training for m in net.modules()]
        model(torch.randn(IMAGE, dtype=torch.float64)).sum().backward()
        assert net.conv1.weight.grad is None and net.bn1.weight.grad is not None

    def test_an_optimizer_made_before_goes_on(self, net):
        plain, x = copy.deepcopy(net), torch.randn(IMAGE, dtype=torch.float64)
        optimizers = [torch.optim.SGD(model.parameters(), 0.01, 0.9) for model in (plain, net)]
        fuse(net, inplace=True)
        for _ in range(3):
            for model, optimizer in zip((plain, net), optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
        close(dict(net.state_dict()), dict(plain.state_dict()))

    def test_state_dicts_load_strictly_both_ways(self, net):
        other = randomize(ResNet())
        fuse(other, inplace=True).load_state_dict(net.state_dict())
        x = torch.randn(IMAGE, dtype=torch.float64)
        close(other.eval()(x), net.eval()(x))
        randomize(net).load_state_dict(other.state_dict())
        close(other(x), net(x))

    @pytest.mark.parametrize("name", ["resnet", "dense", "vgg", "pooled-shortcut"])
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
    def test_copies_and_pickles_are_fused_and_their_own(self, name, how):
        build, shape, expected = MODELS[name]
        model = fuse(randomize(build()), impl="reference").eval()
        if how == "deepcopy":
            other = copy.deepcopy(model)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert fused(other) == expected
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        x = torch.randn(shape, dtype=torch.float64)
        close(other(x), model(x))
        assert fused(unfuse(other)) == {}

    def test_a_pickle_does_not_ask_for_the_forward_by_name(self):
        model = fuse(randomize(Wrapped(4, 4)).eval())
        other = pickle.loads(pickle.dumps(model))
        assert fused(other) == fused(model) != {}
        x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
        close(other(x), model(x))

    def test_moves_to_another_dtype(self, net):
        model = fuse(net).float().eval()
        assert model(torch.randn(IMAGE)).dtype == torch.float32
        assert {p.dtype for p in model.parameters()} == {torch.float32}


class TestChangedLater:
    def test_other_parameters_and_children_are_used(self, net):
        model, plain, x = fuse(net), copy.deepcopy(net), torch.randn(IMAGE, dtype=torch.float64)
        for changed in (model, plain):
            torch.manual_seed(1)
            block = changed.layer1[0]
            block.conv1 = randomize(nn.Conv2d(4, 4, 3, 1, 2, 2, bias=False))
            block.bn2.weight = nn.Parameter(torch.rand(4, dtype=torch.float64))
            changed.conv1 = randomize(nn.Conv2d(3, 4, 7, 2, 3))
        close(model(x), plain(x))

    def test_a_block_with_another_norm_runs_as_it_says(self, net):
        model, plain, x = fuse(net), copy.deepcopy(net), torch.randn(IMAGE, dtype=torch.float64)
        for changed in (model, plain):
            changed.layer1[0].bn1 = nn.InstanceNorm2d(4)
        close(model(x), plain(x))
        assert "is of class InstanceNorm2d" in why(model, "layer1.0.bn1")
        assert "layer1.0" not in fused(model)

    def test_a_forward_with_another_norm_runs_as_it_says(self, net):
        model, plain, x = fuse(net), copy.deepcopy(net), torch.randn(IMAGE, dtype=torch.float64)
        for changed in (model, plain):
            changed.bn1 = nn.InstanceNorm2d(4).double()
        close(model(x), plain(x))
        assert "is of class InstanceNorm2d" in why(model, "bn1")
        fuse(model, inplace=True)
        assert "conv1" not in fused(model) and "layer1.0" in fused(model)

    @pytest.mark.parametrize("edit", STEM_EDITS)
    def test_the_layers_of_a_stem_may_be_changed(self, net, edit):
        model, plain, x = fuse(net), copy.deepcopy(net), torch.randn(IMAGE, dtype=torch.float64)
        for changed in (model, plain):
            STEM_EDITS[edit](changed)
            changed.eval()
        with torch.no_grad():
            close(model(x), plain(x))

    def test_others_may_call_the_layers_of_a_stem(self, net):
        """As feature extractors, U-Nets and `Sequential`s of children do."""
        model, x = fuse(net).train(), torch.randn(IMAGE, dtype=torch.float64)
        plain = copy.deepcopy(net).train()
        for stop in range(1, 5):
            expected = nn.Sequential(*list(plain.children())[:stop])(x)
            cut = nn.Sequential(*list(model.children())[:stop])(x)
            assert type(cut) is torch.Tensor
            close(cut, expected)
        seen = []
        for name in ("conv1", "bn1", "relu"):
            for changed in (model, plain):
                changed.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y))
        close(model(x), plain(x))
        assert len(seen) == 6
        close(dict(model.named_buffers()), dict(plain.named_buffers()))

    def test_a_sequential_may_be_cut_walked_and_extended(self):
        model = randomize(vgg()).eval()
        plain, model = copy.deepcopy(model), fuse(model)
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        for stop in range(len(plain)):
            close(model[:stop](x), plain[:stop](x))
            assert fused(model[:stop]) == {} and type(unfuse(model[:stop])) is nn.Sequential
        y = x
        for layer in model:
            y = layer(y)
        close(y, plain(x))
        for changed in (model, plain):
            changed.append(nn.Tanh())
        close(model(x), plain(x))
        assert fused(model) == {}

    def test_the_children_of_a_net_may_be_strung_together(self, net):
        net.eval()
        backbone = nn.Sequential(*list(fuse(net).children())[:-1])
        x = torch.randn(IMAGE, dtype=torch.float64)
        close(net.fc(backbone(x).mean((2, 3))), net(x))


class TestOurOwn:
    @pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck", "PreActBasicBlock"])
    def test_blocks_go_to_their_plain_twins_and_back(self, name):
        block = randomize(getattr(modules, name)(4, 4, 2)).train()
        plain = unfuse(block)
        assert type(plain) is getattr(blocks, name)
        assert fused(block) and not fused(plain)
        x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
        back = fuse(plain, impl="reference")
        assert type(back) is type(block) and back.impl == "reference" and block.impl == "auto"
        assert_same_mathematics(plain, x)

    def test_models_switch_stem_and_blocks(self):
        model = randomize(resnet_fast.create_model("cifar_resnet20"))
        plain = unfuse(model)
        assert model.fused and not plain.fused
        assert not any(isinstance(m, modules.Fused) for m in plain.modules())
        assert {row.state for row in explain(model).rows} == {"fused"}
        assert {row.state for row in explain(plain).rows} == {"fusible"}
        back = fuse(plain, impl="reference")
        assert back.fused and back.impl == back.layer1[0].impl == "reference"
        assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
        assert_same_mathematics(plain, torch.randn(2, 3, 16, 16, dtype=torch.float64))

    def test_a_plain_twin_with_hooks_inside_is_left_alone(self):
        plain = unfuse(modules.BasicBlock(4, 4))
        plain.bn1.register_forward_hook(lambda *args: None)
        assert type(fuse(plain)) is blocks.BasicBlock
        assert "bn1 has hooks" in why(plain, "(model)")

    def test_a_subclass_of_a_fused_module_has_no_plain_twin(self):
        class Mine(modules.BasicBlock):
            pass

        with pytest.raises(TypeError, match=r"^0: Mine is a subclass of a fused class"):
            unfuse(nn.Sequential(Mine(4, 4)))


class TestExplain:
    def test_rows_are_data_in_the_order_of_the_model(self, net):
        report = explain(net)
        assert [row.path for row in report.rows] == list(MODELS["resnet"][2])
        assert {row.state for row in report.rows} == {"fusible"}
        assert set(report.impls) == {"inference", "training"}

    def test_prints_an_aligned_table(self, net):
        net.layer1[0].conv2.register_forward_hook(lambda *args: None)
        lines = str(explain(fuse(net))).splitlines()
        column = lines[0].index("is ")
        assert lines[0].split() == ["path", "what", "is", "why"]
        assert all(re.match("fused|left alone", line[column:]) for line in lines[1:-3])
        assert re.fullmatch(r"6 fused, 0 fusible, 1 left alone", lines[-3])
        assert re.fullmatch(r'impl="auto" picks \w+ for inference, \w+ for .* on cpu\)', lines[-2])
        counts = "9 of 10 convolutions, 10 of 10 norms, 9 of 9 activations, 4 of 4 additions"
        assert lines[-1] == f"runs fused: {counts}"

    def test_counts_for_each_mode_what_runs_fused(self):
        class Alternating(Basic):
            def forward(self, x):
                return super().forward(x) if self.training else self.bn1(self.conv1(x)) * 2

        model = Alternating(4, 4)
        plain = explain(model)
        assert plain.summary().startswith("fuse would run: 1 of 1 convolutions, 1 of 1 norms; in")
        shares = explain(fuse(model)).shares
        assert shares["evaluation"]["convolutions"] == shares["evaluation"]["norms"] == (1, 1, 1)
        assert shares["training"]["activations"] == (2, 2, 2)
        assert shares["training"]["additions"] == (1, 1, 1)
        assert [(row.what, row.why) for row in explain(model).rows] == [
            ("Alternating: conv norm relu conv norm + x relu", "in training mode"),
            ("conv norm", "in evaluation mode"),
        ]

    @pytest.mark.parametrize("name", [*MODELS, *CALLED])
    def test_says_what_happens(self, name, monkeypatch):
        """The chains that run in one forward are those said to be fused."""
        build, shape, *_ = MODELS.get(name) or CALLED[name]
        model, ran = fuse(randomize(build())), set()

        def run(parts, *args, **options):
            ran.add((parts.convs, parts.norms, parts.pool))
            return modules.run_fused(parts, *args, **options)

        monkeypatch.setattr(rewrite, "run_fused", run)
        model(torch.randn(shape, dtype=torch.float64))
        rows = [row for row in explain(model).rows if row.state == "fused"]
        said = [row for row in rows if row.why in ("", "in training mode")]
        assert len(ran) == len(said)
        assert len(said) > 0 or name == "flag"

    def test_of_a_forward_that_cannot_be_traced_says_where_it_is_called(self):
        class Deciding(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = Basic(4, 4)

            def forward(self, x):
                return self.block(x) if x.mean() > 0 else x

        assert why(fuse(Deciding()), "block").startswith("fused: only if it is called")

    def test_under_global_hooks_nothing_is_fused(self, net):
        model = fuse(net)
        handle = register_module_forward_hook(lambda *args: None)
        try:
            assert fused(model) == {}
            assert why(model, "layer1.0").startswith("left alone: global module hooks are set")
        finally:
            handle.remove()
        assert "layer1.0" in fused(model)

    def test_of_a_model_without_anything_to_fuse(self):
        report = explain(nn.Linear(3, 4))
        assert report.rows == [] and str(report).startswith("nothing to fuse")


class TestErrors:
    @pytest.mark.parametrize("function", [fuse, unfuse, explain])
    def test_not_a_module(self, function):
        with pytest.raises(TypeError, match=r"^model: expected an nn.Module, got list"):
            function([nn.Conv2d(3, 4, 1)])

    def test_unknown_impl(self, net):
        with pytest.raises(ValueError, match=r"^impl: expected one of .*got 'cuda'"):
            fuse(net, impl="cuda")
        assert fused(net) == {}

    def test_an_implementation_that_is_not_there_says_so_when_called(self, net):
        if backends.refusal("triton", "conv_fprop", "cpu", torch.float64) is None:
            pytest.skip("triton runs here")
        with pytest.raises(RuntimeError, match=r"^impl='triton' cannot run"):
            fuse(net, impl="triton")(torch.randn(IMAGE, dtype=torch.float64))

    def test_a_class_derived_from_a_fused_one_is_not_taken_apart(self, net):
        model = fuse(net)
        block = model.layer1[0]
        block.scale = nn.Parameter(torch.ones(1))
        parametrize.register_parametrization(block, "scale", nn.Identity())
        with pytest.raises(TypeError, match="got ParametrizedFusedBasic, derived from one"):
            unfuse(model, inplace=True)
