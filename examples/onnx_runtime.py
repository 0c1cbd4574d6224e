"""Export to ONNX and run in ONNX Runtime: `unfuse` gives the plain PyTorch model to export.

Needs: pip install onnx onnxscript onnxruntime
Run:   python examples/onnx_runtime.py
"""

import io

import onnxruntime
import torch

import resnet_fast


def main():
    torch.manual_seed(0)
    model = resnet_fast.create_model("resnet18", num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)

    plain = resnet_fast.unfuse(model)  # the same parameters; the ops of resnet_fast are not ONNX's
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        plain, (x,), input_names=["x"], output_names=["logits"],
        dynamic_shapes=({0: batch},), dynamo=True, verbose=False,
    )  # fmt: skip
    file = io.BytesIO()
    program.save(file)

    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for images in (x, torch.randn(5, 3, 64, 64)):
        (logits,) = session.run(["logits"], {"x": images.numpy()})
        with torch.no_grad():
            expected = model(images)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-3)
    print("ok: ONNX Runtime and the fused model agree")


if __name__ == "__main__":
    main()
