"""A CUDA graph on the CPU: every op that a call makes, repeated on the memory it was recorded on.

As with a real graph, what Python does between the ops happens while recording and never again, and
recording itself changes nothing: the tensors that existed before are put back.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


def record(run, device):
    """In place of `resnet_fast.cuda_graphs._record`."""
    tape = Tape()
    with torch.random.fork_rng([]), tape:
        results = run()
    tape.put_back()

    def replay():
        for func, args, kwargs, outputs in tape.calls:
            again = tree_flatten(func(*args, **kwargs))[0]
            for to, value in zip(outputs, again, strict=True):
                if isinstance(to, torch.Tensor) and not shares(to, value):
                    with torch.no_grad():
                        to.copy_(value)
        return results

    return replay


def shares(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Runs each op and notes it; keeps what the tensors held that were there before."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        for tensor in inputs:  # a batch norm writes its running statistics and does not say so
            self.remember(tensor)
        out = func(*args, **kwargs)
        outputs = tree_flatten(out)[0]
        self.calls.append((func, *tree_map(plain, (args, kwargs, outputs))))
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor) and not any(shares(tensor, t) for t in inputs):
                self.made.add(tensor.untyped_storage().data_ptr())
        return out

    def remember(self, tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in self.made and place not in self.before:
            self.before[place] = (tensor.detach(), tensor.detach().clone())

    def put_back(self):
        with torch.no_grad():
            for tensor, value in self.before.values():
                tensor.copy_(value)


def plain(value):
    """The memory of a tensor, without its history."""
    return value.detach() if isinstance(value, torch.Tensor) else value
