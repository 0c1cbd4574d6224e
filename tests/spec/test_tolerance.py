"""The tolerance rule itself: what passes, what fails, and that nothing slips through."""

import functools
import math

import pytest
import torch

from resnet_fast.spec.dtypes import PRECISIONS
from resnet_fast.spec.tolerance import (
    FACTOR,
    GRADIENT_FACTOR,
    MAX_KINK_SHARE,
    SPREAD,
    assert_close,
    compare,
    near_kink,
    plain_runs,
)


def triple(dtype=torch.float32, size=(4, 8, 7, 5), seed=0):
    """A result in `dtype` and the same in fp64, apart by rounding."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(size, generator=generator, dtype=torch.float64)
    return exact.to(dtype), exact


@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=PRECISIONS)
def test_identical_passes(dtype):
    same, exact = triple(dtype)
    verdict = compare(same, same, exact)
    assert verdict.ok
    assert verdict.error == (same.double() - exact).abs().max().item()
    eps = torch.finfo(dtype).eps * exact.abs().max().item()
    assert verdict.allowed == pytest.approx(FACTOR * (verdict.error + eps))


def test_what_fails_is_judged_beside_more():
    """And what passes asks for nothing."""
    same, exact = triple()
    asked = []

    def more(error):
        asked.append(error)
        return [same + error]

    poor = same + 1e-3
    assert compare(same, same, exact, more=lambda: more(0)).ok
    assert not asked
    assert compare(poor, same, exact, more=lambda: more(1e-3)).ok
    assert not compare(poor, same, exact, more=lambda: more(1e-5)).ok
    assert asked == [1e-3, 1e-5]


def test_plain_runs_by_threads_and_onednn():
    before = torch.get_num_threads(), torch.backends.mkldnn.enabled
    seen = set(plain_runs(lambda: (torch.get_num_threads(), torch.backends.mkldnn.enabled)))
    assert seen == {(1, True), (1, False), (3, True), (3, False)}
    assert (torch.get_num_threads(), torch.backends.mkldnn.enabled) == before


@pytest.mark.parametrize("channels", [1, 16])
def test_plain_runs_by_onednn_alone(monkeypatch, channels):
    """Of each number of threads the last; one channel is PyTorch's."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch has no oneDNN")
    real, asked = torch.mkldnn_convolution, []

    def noted(x, w, *rest):
        asked.append(torch.get_num_threads())
        return real(x, w, *rest)

    monkeypatch.setattr(torch, "mkldnn_convolution", noted)
    x, w = torch.randn(1, channels, 8, 9), torch.randn(4, channels, 3, 3, requires_grad=True)
    conv = functools.partial(torch.nn.functional.conv2d, x, w, padding=(1, 0), stride=(1, 2))
    runs = list(plain_runs(conv))
    assert len(runs) == 6 and asked == ([1, 3] if channels > 1 else [])
    for y in runs:
        torch.testing.assert_close(y, runs[0])
        assert y.requires_grad


@pytest.mark.parametrize("gradient", [False, True], ids=["result", "gradient"])
def test_one_element_past_the_limit_fails(gradient):
    same, exact = triple()
    allowed = compare(same, same, exact, gradient=gradient).allowed
    for share, ok in ((0.99, True), (1.01, False)):
        actual = exact.float()
        actual[1, 2, 3, 4] = 0.0
        exact[1, 2, 3, 4] = share * allowed
        verdict = compare(actual, same.where(actual != 0, exact.float()), exact, gradient=gradient)
        assert verdict.ok is ok, verdict


def test_gradients_are_allowed_more():
    same, exact = triple()
    plain, gradient = (compare(same, same, exact, gradient=g) for g in (False, True))
    assert gradient.allowed / plain.allowed == pytest.approx(GRADIENT_FACTOR / FACTOR)


def test_a_poor_reference_allows_more():
    same, exact = triple()
    poor = same + 1e-3
    assert not compare(poor, same, exact).ok
    assert compare(poor, poor, exact).ok
    assert compare(poor, [same, poor], exact).ok


def test_a_lucky_reference_of_few_elements_counts_by_its_spread():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    same = torch.tensor([1.0, 2.0 + 1e-4])
    own = (same.double() - exact).square().mean().sqrt().item()
    floor = torch.finfo(torch.float32).eps * 2
    assert compare(same, same, exact).allowed == pytest.approx(FACTOR * (SPREAD * own + floor))


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["result", "reference", "fp64 result"])
def test_nan_and_infinity_fail_wherever_they_are(which, value):
    same, exact = triple()
    given = [same.clone(), same.clone(), exact.clone()]
    given[which][0, 0, 0, 0] = value
    everywhere = torch.zeros_like(same, dtype=torch.bool)
    everywhere[0, 0, 0, 0] = True
    for kink in (None, everywhere):
        verdict = compare(*given, kink=kink)
        assert not verdict.ok
        assert "NaN or infinity" in verdict.why
    assert not compare(*(x * math.nan for x in given)).ok


def test_shape_and_dtype_have_to_fit():
    same, exact = triple()
    assert "shape" in compare(same[:1], same, exact).why
    assert "shape" in compare(same, same, exact[:1]).why
    assert "dtype" in compare(same.bfloat16(), same, exact).why
    assert compare(same[:0], same[:0], exact[:0]).ok


def test_fp64_is_judged_by_fp32_scaled():
    same, exact = triple()
    actual = exact.clone()
    actual[0, 0, 0, 0] += 1e-16
    assert compare(actual, same, exact).ok
    actual[0, 0, 0, 0] += 1e-12
    assert not compare(actual, same, exact).ok


def test_integers_and_bools_are_equal_or_wrong():
    count = torch.tensor(3)
    assert compare(count, count, count).ok
    verdict = compare(count, count, count + 1)
    assert (verdict.ok, verdict.error) == (False, 1.0)
    mask = torch.tensor([True, False, True])
    assert compare(mask, mask, mask).ok
    assert compare(mask, mask, ~mask).error == 3


def test_the_band_is_left_out_and_must_be_narrow():
    u = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    band = near_kink(u, torch.float32)
    assert band.sum() == 1  # u = 0 alone
    actual = torch.relu(u).float()
    wrong = actual.where(~band, 7.0)
    assert not compare(wrong, actual, torch.relu(u)).ok
    verdict = compare(wrong, actual, torch.relu(u), kink=band)
    assert verdict.ok
    assert verdict.kink_share == pytest.approx(1 / 20001)
    wide = u.abs() < 2 * MAX_KINK_SHARE
    verdict = compare(actual, actual, torch.relu(u), kink=wide)
    assert not verdict.ok
    assert "kink" in verdict.why
    assert near_kink(u[:0], torch.float32).shape == (0,)


def test_arithmetic_narrower_than_the_result():
    exact = torch.ones(4, dtype=torch.float64)
    same = exact.float()
    actual = same + 2**-8
    assert not compare(actual, same, exact).ok
    assert compare(actual, same, exact, dtype=torch.bfloat16).ok


def test_rms_forgives_one_element_but_not_many():
    same, exact = triple(torch.bfloat16, (64, 64, 4, 4))
    actual = same.clone()
    actual[0, 0, 0, 0] += 0.25
    assert not compare(actual, same, exact).ok
    assert compare(actual, same, exact, rms=True).ok
    assert not compare(same * 1.02, same, exact, rms=True).ok


def test_assert_close_says_what():
    same, exact = triple()
    assert assert_close(same, same, exact).ok
    with pytest.raises(AssertionError, match=r"conv1: error 1 > .* allowed"):
        assert_close(same + 1, same, exact, "conv1")
