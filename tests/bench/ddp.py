"""Several ranks against one process at the same global batch.

    python -m tests.bench.ddp --ranks=2 --model=ViT-B-32 --batch=32
    python -m tests.bench.ddp --ranks=8 --model=ViT-B-32 --batch=8192 --device=cuda

The step of tests/bench/step.py, fp32 or bf16, in one group of processes, in turns: rank 0 alone
with the whole batch and all threads, and all ranks with a share of both (on GPUs: one GPU, then
all). The gradients' all-reduce is also run by itself: what it costs where nothing hides it.
"""
import os
import subprocess
import sys

import torch
import torch.distributed as dist

from data.ranks import Ranks
from model import SIZES
from tests.bench import (environment, interleave, make_batch, options, ratio, spread, start,
                         table)
from tests.bench.step import OurStep


def measure(args, ranks, device):
    """({name: [seconds]} of one process, all ranks and the all-reduce alone, its bytes).

    DDP is freed on return. Freed after its group has ended, it may wait for itself forever: its
    destructor joins a thread of gloo's that waits for Python's lock (torch 2.13, one run in six).
    """
    config = SIZES[args.model]
    images, tokens = make_batch(config, args.batch, device)
    share = args.batch // ranks.world
    rows = slice(ranks.rank * share, (ranks.rank + 1) * share)
    single = OurStep(config, device, args.dtype) if ranks.rank == 0 else None
    joint = OurStep(config, device, args.dtype, ranks=ranks)
    flat = torch.zeros(sum(p.numel() for p in joint.clip.parameters()), device=device)

    def one(mark):
        torch.set_num_threads(args.threads)
        ranks.total(0)
        mark()
        if single:
            single(images, tokens, mark)
        mark()
        ranks.total(0)  # the others wait here, asleep

    def all_of_them(mark):
        torch.set_num_threads(max(args.threads // ranks.world, 1))
        ranks.total(0)
        mark()
        joint(images[rows], tokens[rows], mark)
        mark()
        ranks.total(0)

    def reduce(mark):
        ranks.total(0)
        mark()
        dist.all_reduce(flat)
        mark()
        ranks.total(0)

    laps = interleave({"one": one, "all": all_of_them, "reduce": reduce}, args.rounds, device)
    seconds = {name: [sum(lap[1:-1]) for lap in rounds] for name, rounds in laps.items()}
    return seconds, 4 * flat.numel()  # without the barriers, first lap and last


def main():
    args = options(__doc__, ranks=2, model="ViT-B-32", batch=32, dtype="float32").parse_args()
    if "RANK" not in os.environ:  # start the ranks: this module again, under torchrun
        raise SystemExit(subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             f"--nproc_per_node={args.ranks}", "-m", "tests.bench.ddp", *sys.argv[1:],
             f"--threads={args.threads}"],  # torchrun would give each rank one thread
            env=environment(args.device)).returncode)
    if args.quick:
        args.model, args.batch, args.rounds = "toy", 8 * args.ranks, 1
    ranks = Ranks()
    if ranks.rank > 0:
        sys.stdout = open(os.devnull, "w")
    start(args)
    device = ranks.start()
    seconds, gradient_bytes = measure(args, ranks, device)
    each = "GPU" if args.device == "cuda" else f"{max(args.threads // ranks.world, 1)} threads"
    table((f"{args.model}, global batch {args.batch}, {args.dtype}", "seconds", "times faster"),
          [("one process, " + ("one GPU" if args.device == "cuda" else f"{args.threads} threads"),
            spread(seconds["one"]), 1),
           (f"{ranks.world} ranks, {each} each", spread(seconds["all"]),
            ratio(seconds["one"], seconds["all"])),
           (f"all-reduce of {gradient_bytes / 1e6:,.0f} MB alone", spread(seconds["reduce"]), "")])


if __name__ == "__main__":
    main()
