"""Export a fused model by torch.export, compile it ahead of time by AOTInductor, load and run it.

The package calls the ops of resnet_fast: the process that loads it must import resnet_fast first.

Needs: a C++ compiler
Run:   python examples/export_aoti.py
"""

import tempfile
from pathlib import Path

import torch

import resnet_fast


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = resnet_fast.ResNet(resnet_fast.BasicBlock, [1, 1, 1], 10, stem="cifar").eval()
    model = model.to(device, memory_format=torch.channels_last)
    x = torch.randn(4, 3, 32, 32, device=device).to(memory_format=torch.channels_last)

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        fused = [n for n in program.graph.nodes if "resnet_fast.conv_bn_act" in str(n.target)]
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "resnet.pt2")
        )
        compiled = torch._inductor.aoti_load_package(path)
        for images in (x, x[:3], x.contiguous()):
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)

    assert fused
    print(f"ok: {len(fused)} fused convolutions in the package, outputs agree")


if __name__ == "__main__":
    main()
