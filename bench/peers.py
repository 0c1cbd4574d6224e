"""OpenVINO and ONNX Runtime, as providers of `bench models`.

Each runs a plain PyTorch module on the CPU, with as many threads as PyTorch has. Both fold
BatchNorm and choose their layouts themselves. They are optional:
`pip install openvino onnxruntime onnxscript`.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.step import Case, prepare
from resnet_fast.runtime.optional import imported


class Runtime(nn.Module):
    """Calls `infer(numpy array)`, which returns the logits as a numpy array; x is NCHW fp32."""

    def __init__(self, infer: Any) -> None:
        super().__init__()
        self._infer = infer

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] in the dtype of x."""
        return torch.from_numpy(self._infer(x.float().contiguous().numpy())).to(x.dtype)


def openvino_takes(case: Case) -> bool:
    """Inference on a CPU in fp32 or bf16."""
    return case.device.type == "cpu" and case.mode == "infer" and case.dtype in ("fp32", "bf16")


def openvino(plain: nn.Module, case: Case, x: Tensor) -> nn.Module:
    """`plain` by OpenVINO: hint for latency, one stream.

    For case.dtype "bf16", OpenVINO infers in bf16 on a CPU with bf16 instructions, else in fp32.
    MissingPackage if it is not installed.
    """
    ov = imported("openvino", "benchmarks of OpenVINO", "openvino")
    with _quietly():
        model = ov.convert_model(
            _fp32(plain, case), example_input=x.float(), input=[tuple(x.shape)]
        )
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if case.dtype == "bf16" else "f32",
    }
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    return Runtime(lambda array: request.infer([array], share_inputs=True)[0])


def onnxruntime_takes(case: Case) -> bool:
    """Inference on a CPU in fp32; it has no convolutions in bf16 there."""
    return case.device.type == "cpu" and case.mode == "infer" and case.dtype == "fp32"


def onnxruntime(plain: nn.Module, case: Case, x: Tensor) -> nn.Module:
    """`plain` by ONNX Runtime with all graph optimizations. MissingPackage if not installed."""
    ort = imported("onnxruntime", "benchmarks of ONNX Runtime", "onnxruntime")
    imported("onnxscript", "benchmarks of ONNX Runtime", "onnxscript")
    file = io.BytesIO()
    with _quietly():
        program = torch.onnx.export(_fp32(plain, case), (x.float(),), dynamo=True, verbose=False)
        program.save(file)  # type: ignore[union-attr]
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Otherwise its threads occupy their cores for tens of milliseconds after a run.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Runtime(lambda array: session.run(None, {name: array})[0])


def _fp32(plain: nn.Module, case: Case) -> nn.Module:
    return prepare(copy.deepcopy(plain), case, "nchw").float()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' warnings, which are about packages and options not used here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
