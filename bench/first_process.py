"""What `bench.first` runs: one first inference in this very process, timed from its imports on.

`python -m bench.first_process '{"model": …}'` prints one JSON object of seconds. Nothing but the
standard library is imported before the clock starts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any


def main(options: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each part; RuntimeError where the first logits are wrong.

    import_torch_s, import_s: `import torch`, `import resnet_fast` (which defines the model, for
    its peers too). build_s: the model on the device. first_s: its first logits, compilation and
    choice of kernels included. total_s: all but `import torch`.
    """
    times = [time.perf_counter()]

    def lap() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    import torch

    lap()
    import resnet_fast

    lap()
    from bench import gate, models, step  # the bench's own: in no part

    case = step.Case(
        options["model"], "infer", options["batch"], options["dtype"],
        torch.device(options["device"]), options["image_size"], options["impl"],
    )  # fmt: skip
    torch.manual_seed(0)
    size = (case.batch, 3, case.image_size, case.image_size)
    x = torch.randn(size).to(case.parameter_dtype).contiguous(memory_format=torch.channels_last)
    own = options["provider"] == "resnet_fast"
    start = time.perf_counter()
    model = resnet_fast.create_model(case.model, impl=case.impl if own else "reference")
    if not own:
        resnet_fast.unfuse(model, inplace=True)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.mul_(0.5)  # a fresh net doubles its variance a block, past fp16
    step.prepare(model, case, "channels_last")
    x = x.to(case.device)
    lap()
    if options["provider"] == "compile":
        run = models.compiled(model, case)
        with models.freezing(case):
            logits = step.infer(run, x)
    else:
        logits = step.infer(model, x)
    lap()
    plain = model if not own else resnet_fast.unfuse(model)
    check = gate.at_full_size(logits, plain, case, x)
    if not check.ok:
        raise RuntimeError(f"{options['provider']}: {check}")
    torch_s, package_s = times[1] - times[0], times[2] - times[1]
    build_s, first_s = times[3] - start, times[4] - times[3]
    return {
        "import_torch_s": torch_s, "import_s": package_s, "build_s": build_s, "first_s": first_s,
        "total_s": package_s + build_s + first_s,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
