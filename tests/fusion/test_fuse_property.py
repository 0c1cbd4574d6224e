"""Random models with random surgery before and after `fuse` compute what plain PyTorch does."""

import copy
import warnings

import pytest
import torch
from random_models import (
    KERNELS,
    SHORTCUTS,
    SIDES,
    STYLES,
    SURGERY,
    TOPS,
    Layer,
    Recipe,
    Surgery,
    change,
    global_hook,
)

from resnet_fast import explain, fuse

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

FIXED = hypothesis.settings(
    derandomize=True, deadline=None, database=None, max_examples=100,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip


@st.composite
def layers(draw):
    kind = draw(st.sampled_from(list(KERNELS)))
    shortcut = "none" if kind == "unit" else draw(st.sampled_from(SHORTCUTS))
    return Layer(
        kind, draw(st.sampled_from(STYLES)), shortcut,
        draw(st.sampled_from([1, 2])) if shortcut in ("none", "projection", "opaque") else 1,
        draw(st.sampled_from(("none", *SIDES))), draw(st.booleans()), draw(st.booleans()),
    )  # fmt: skip


surgeries = st.lists(
    st.builds(Surgery, st.sampled_from(list(SURGERY)), st.integers(0, 20)), max_size=2
).map(tuple)
recipes = st.builds(
    Recipe,
    layers=st.lists(layers(), min_size=1, max_size=2).map(tuple),
    top=st.sampled_from(TOPS),
    before=surgeries,
    after=surgeries,
    training=st.booleans(),
    mode=st.sampled_from(["grad", "grad", "no_grad", "inference_mode", "jvp"]),
    inplace=st.booleans(),
    warm=st.booleans(),
    copied=st.booleans(),
    global_hook=st.sampled_from([False, False, True]),
    channels_last=st.booleans(),
)


def image(recipe):
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3)).double()
    return x.contiguous(memory_format=torch.channels_last) if recipe.channels_last else x


def call(recipe, model):
    """What comes of one call of `model`, as `recipe` says."""
    x = image(recipe)
    if recipe.mode == "jvp":
        y, tangent = torch.func.jvp(model, (x,), (x.cos(),))
        return {"y": y, "tangent": tangent}
    if recipe.mode != "grad":
        with getattr(torch, recipe.mode)():
            y = model(x)
        return dict(enumerate(y)) if isinstance(y, tuple) else {"y": y}
    model.zero_grad()
    y = model(x.requires_grad_())
    (y.sin() * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).sum().backward()
    found = {"y": y, "x": x.grad} | {name: p.grad for name, p in model.named_parameters()}
    return found | {"evaluation": evaluate(model, x)}


def evaluate(model, x):
    """What `model` gives without gradients in evaluation mode; it keeps its own modes."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        y = model(x)
    for module, training in modes:
        module.training = training
    return y


def outcome(recipe, prepare):
    """Results, buffers and calls of hooks; or the error, by its class."""
    counts = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = recipe.model()
            change(model, recipe.before, counts)
            model = prepare(model)
            if recipe.warm:
                call(recipe, model)
            if recipe.copied:
                model = copy.deepcopy(model)
            change(model, recipe.after, counts)
            with global_hook(model, recipe.global_hook, counts):
                found = call(recipe, model)
            return found | dict(model.named_buffers()), counts
        except Exception as error:
            return error, None


def check(recipe):
    inplace = recipe.inplace or any(s.name.startswith("forward") for s in recipe.before)
    expected, expected_counts = outcome(recipe, lambda model: model)
    actual, counts = outcome(recipe, lambda model: fuse(model, inplace=inplace))
    if isinstance(expected, Exception):
        assert isinstance(actual, Exception), f"only plain PyTorch raises: {expected!r}"
        return
    if isinstance(actual, Exception):
        raise AssertionError("only the fused model raises") from actual
    assert counts == expected_counts
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
            continue
        atol = 1e-9 * max(1.0, value.detach().abs().max().item())
        torch.testing.assert_close(
            actual[name], value, rtol=1e-9, atol=atol, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.slow
@FIXED
@hypothesis.given(recipes)
def test_equals_plain_pytorch(recipe):
    check(recipe)


@pytest.mark.parametrize("name", SURGERY)
@pytest.mark.parametrize("when", ["before", "after"])
def test_every_surgery_alone(name, when):
    layers = (Layer(style="separate", shortcut="projection", pool=True),)
    both = (Surgery(name, 0), Surgery(name, 1))  # of the stem, and of the block
    check(Recipe(layers, "stem", warm=when == "after", **{when: both}))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KERNELS)
def test_what_it_builds_is_fused(kind, style):
    """Else the properties would hold of models that nothing was done to."""
    shortcut = "none" if kind == "unit" else "identity"
    recipe = Recipe((Layer(kind, style, shortcut),))
    rows = explain(fuse(recipe.model())).rows
    assert any(row.state == "fused" for row in rows)
    check(recipe)
