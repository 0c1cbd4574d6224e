"""Several processes of one torch.distributed group that run what they get.

They start once and serve many tests: most of their cost is the import of torch.
"""

import datetime
import multiprocessing.connection
import pickle
import traceback

import torch
import torch.distributed as dist

PATIENCE = 120  # seconds until a process counts as lost


class Processes:
    """`count` processes of the default group; `run` calls a function in all of them at once.

    backend: "gloo", or "nccl" with a GPU for each.
    """

    def __init__(self, count, folder, backend="gloo"):
        context = multiprocessing.get_context("spawn")  # a fork would inherit OpenMP's threads
        self.pipes, self.started = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            args = (rank, count, backend, f"file://{folder}/store", theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.started.append(process)

    def run(self, function, *args):
        """[function(rank, *args) of every process]; the first error of any raises here."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        results, left = {}, dict(enumerate(self.pipes))
        while left:
            ready = multiprocessing.connection.wait(left.values(), PATIENCE)
            if not ready:
                self.close()
                raise TimeoutError(f"process {min(left)} did not answer in {PATIENCE} seconds")
            for rank in [rank for rank, pipe in left.items() if pipe in ready]:
                try:
                    results[rank], error = pickle.loads(left.pop(rank).recv_bytes())
                except EOFError:
                    error = "it died"
                if error:  # the others may wait for it for ever
                    self.close()
                    raise AssertionError(f"process {rank}: {error}")
        return [results[rank] for rank in range(len(results))]

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.started:
            process.kill()
            process.join()


def _serve(rank, count, backend, store, pipe):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=store, rank=rank, world_size=count,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )  # fmt: skip
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            told = function(rank, *args), None
        except Exception:
            told = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(told))
