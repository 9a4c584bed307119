"""The processes of a run: which of them this is, what they tell each other, what they may use.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; without it a process is alone and nothing waits.
"""
import atexit
import contextlib
import datetime
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
# Its functions keep the group of this moment as their default: none yet. Imported later, as DDP
# would, they hold the run's group beyond leave(), and gloo's threads go on into Python's exit.
import torch.distributed.nn  # noqa: F401

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds a period, or "max"


class Ranks:
    """rank of `world` processes; `local` is its place, and its GPU, on its own machine."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))

    def share(self, batch_size):
        """This rank's part of a batch; ValueError, with the nearest that works, if uneven."""
        if batch_size % self.world:
            less = batch_size // self.world * self.world
            raise ValueError(f"batch_size={batch_size} is not a multiple of {self.world} "
                             f"ranks; try {less + self.world} or {less}")
        return batch_size // self.world

    def start(self):
        """Join the group until Python ends; returns the torch.device of this rank."""
        device = torch.device("cpu")
        if torch.cuda.is_available():
            if self.local >= torch.cuda.device_count():
                raise ValueError(f"more ranks than the {torch.cuda.device_count()} GPUs there are")
            device = torch.device("cuda", self.local)
            torch.cuda.set_device(device)
        if self.world > 1:  # both back ends: hosts exchange counts without waiting for a GPU
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            atexit.register(self.leave)
        return device

    @contextlib.contextmanager
    def first_alone(self):
        """The block runs on rank 0 first, then on the others: for files that it leaves behind.

        They wait for a day: an index of 15 million pairs on a slow disk takes hours.
        """
        if self.world == 1:
            yield
            return
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        if self.rank > 0:
            dist.barrier(patient)
        yield
        if self.rank == 0:
            dist.barrier(patient)
        dist.destroy_process_group(patient)

    def leave(self):
        """Leave the group; not after a traceback, of which the others may know nothing."""
        if not hasattr(sys, "last_value"):  # else NCCL would wait for them
            dist.destroy_process_group()

    def total(self, *counts):
        """Each integer summed over the ranks, between the hosts; also a barrier."""
        counts = torch.tensor(counts)
        if self.world > 1:
            dist.all_reduce(counts)
        return counts.tolist()

    def mean(self, figures):
        """A float tensor averaged over the ranks, as a list; waits for the device."""
        if self.world > 1:
            dist.all_reduce(figures)
        return (figures / self.world).tolist()

    def collect(self, thing):
        """[thing of rank 0, thing of rank 1, ...] on every rank; any object, of any size."""
        if self.world == 1:
            return [thing]
        things = [None] * self.world
        dist.all_gather_object(things, thing)
        return things

    def agree(self, answer, what):
        """`answer` if all ranks have the same one; else ValueError, on all of them."""
        answers = self.collect(answer)
        for rank, other in enumerate(answers):
            if other != answers[0]:
                raise ValueError(f"rank 0 and rank {rank} differ on {what}; all nodes must see "
                                 "the same folders, out_dir too")
        return answer

    def gather(self, *rows):
        """Float rows (b, ...) of this rank -> those of all ranks (B, ...), for each argument.

        One collective for all, with gradient: backward sums what every rank asks of a row.
        """
        if self.world == 1:
            return rows
        flat = [x.reshape(len(x), -1) for x in rows]                      # (b, n) each
        everyone = GatherRows.apply(torch.cat(flat, dim=1))               # (B, sum of n)
        parts = everyone.split([x.shape[1] for x in flat], dim=1)
        return [part.reshape(-1, *x.shape[1:]) for part, x in zip(parts, rows)]


class GatherRows(torch.autograd.Function):
    """(b, D) of each rank -> (B, D) on all; backward is the sum over ranks of what they ask."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):  # (B, D) -> (b, D)
        grad_rows = torch.empty_like(grad.chunk(dist.get_world_size())[0])
        dist.reduce_scatter(grad_rows, list(grad.contiguous().chunk(dist.get_world_size())))
        return grad_rows


def usable_cores():
    """How many cores this process may use: a container's share, not the host's."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        cores = len(os.sched_getaffinity(0))
    if CPU_QUOTA.is_file():
        quota, period = CPU_QUOTA.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def need_compiler():
    """ValueError unless a C++ compiler is there, which torch.compile calls."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if not any(name and shutil.which(name) for name in names):
        raise ValueError("compile=True: torch.compile needs a C++ compiler, and none is here; "
                         "install g++, or --compile=false")
