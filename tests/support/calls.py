"""Calls of the public functions: named cases whose tensors are drawn once for every dtype."""

import torch
import twins

CASES = {  # name → function, {argument: shape}, options
    "conv": ("conv_bn_act", {"x": (2, 8, 7, 7), "weight": (24, 8, 3, 3)}, {"padding": 1}),
    "conv-stem": (
        "conv_bn_act",
        {"x": (2, 3, 17, 15), "weight": (24, 3, 7, 7)},
        {"padding": 3, "stride": 2},
    ),
    "conv-bias-residual": (
        "conv_bn_act",
        {"x": (2, 8, 5, 7), "weight": (16, 8, 1, 1), "bias": (16,), "residual": (2, 16, 5, 7)},
        {},
    ),
    "conv-grouped-linear": (
        "conv_bn_act",
        {"x": (2, 8, 7, 7), "weight": (12, 2, 3, 3)},
        {"padding": 2, "dilation": 2, "groups": 4, "relu": False},
    ),
    "bn": ("bn_act", {"x": (2, 24, 7, 7)}, {}),
    "bn-residual": ("bn_act", {"x": (3, 5, 9, 7), "residual": (3, 5, 9, 7)}, {}),
    "bn-one-channel": ("bn_act", {"x": (4, 1, 7, 7)}, {"eps": 1e-3, "momentum": 0.3}),
    "add": ("add_relu", {"x": (2, 17, 7, 5), "residual": (2, 17, 7, 5)}, {}),
}
OPS = ("bn_act", "conv_fprop", "conv_bprop", "conv_bn_act")


class Call:
    """One call of `case` in `dtype`, frozen or `training`.

    Attributes:
        tensors: the differentiable arguments, fp32; replace or add to them freely. What is drawn
            is exact in `dtype`, so that every dtype's run starts from the same values.
        running: running_mean and running_var, fp32, or nothing for add_relu.
    """

    def __init__(self, case, layout=torch.contiguous_format, training=False, dtype=torch.float32):
        self.function, shapes, self.options = CASES[case]
        self.layout, self.dtype, self.dy, self.running = layout, dtype, None, {}
        self.tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
        if self.function != "add_relu":
            channels = shapes["weight"][0] if "weight" in shapes else shapes["x"][1]
            self.tensors["bn_weight"] = torch.randn(channels) * 0.2 + 1.0
            self.tensors["bn_bias"] = torch.randn(channels)
            self.running["running_mean"] = torch.randn(channels) * 0.3
            self.running["running_var"] = torch.rand(channels) + 0.5
            self.options = {**self.options, "training": training}
        for name, value in self.tensors.items():
            if not name.startswith("bn"):
                self.tensors[name] = value.to(dtype).float()

    def make(self, dtype, device=None):
        """The tensors as leaves of `dtype`, and the running statistics; by default where they are.

        What belongs to the normalization is fp32 (fp64 for double), as PyTorch's wants it.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def leaf(name, value):
            value = value.to(device, wide if name.startswith("bn") else dtype, copy=True)
            return dense(value, self.layout).requires_grad_()

        leaves = {name: leaf(name, value) for name, value in self.tensors.items()}
        return leaves, {name: r.to(device, wide, copy=True) for name, r in self.running.items()}

    def run(self, module, leaves, running, impl=None):
        """y by `module`'s function: the package's, or `twins`'."""
        return getattr(module, self.function)(**leaves, **running, **self.options, impl=impl)

    def step(self, module, dtype, impl=None, device=None):
        """`twins.step` in `dtype`; dy is drawn at the first call and kept."""
        leaves, running = self.make(dtype, device)
        if self.dy is None:
            with torch.no_grad():
                shape = self.run(module, *self.make(dtype, device), impl).shape
            self.dy = torch.randn(shape).to(self.dtype).float()
        dy = dense(self.dy.to(device, dtype), self.layout)
        return twins.step(lambda: self.run(module, leaves, running, impl), leaves, dy, running)

    def judge(self, impl, module):
        """The step of `module` under `impl` against the twins', by the one rule; gives it back."""
        exact = self.step(twins, torch.float64)
        same = self.step(twins, same_dtype(self.dtype))
        actual = self.step(module, self.dtype, impl.name, impl.device)
        twins.judge(actual, same, exact)
        return actual


def same_dtype(dtype):
    """The dtype of the twin beside a result in `dtype`: for fp64 fp32 (see `tolerance.compare`)."""
    return torch.float32 if dtype == torch.float64 else dtype


def dense(value, layout):
    """`value` in `layout` where it has one."""
    return value.contiguous(memory_format=layout) if value.dim() == 4 else value


def away_from_kink(case, *args, change=None, **kwargs):
    """A `Call(case, ...)`, after `change(call)`, with no ReLU input near zero."""

    def draw():
        call = Call(case, *args, **kwargs)
        if change is not None:
            change(call)
        return [call]

    return twins.away_from_kink(draw, lambda call: call.run(twins, *call.make(torch.float64)))[0]
