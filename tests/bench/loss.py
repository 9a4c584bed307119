"""Seconds and memory of the contrastive loss with its gradient: all logits at once, or in chunks.

    python -m tests.bench.loss                            # 4,096, 16,384 and 65,536 pairs
    python -m tests.bench.loss --pairs=16384 --chunks=256,512,1024,2048,4096

pretrain.contrastive_loss on unit embeddings of width 512, fp32, or data.pieces.ChunkedLoss. Every
run has a process of its own, in turns. Extra memory is the peak above what the embeddings take
(resident on CPU, allocated on a GPU). Where the plain form would not fit it is left out, with
what it would need; sizes above 20,000 pairs run once, with the chunk that was best at the size
before. Relative to plain where that was run.
"""
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

import pretrain
from data.pieces import ChunkedLoss
from tests.bench import Clock, fresh, options, ratio, spread, start, table

WIDTH = 512


def plain_bytes(pairs):
    """Peak of the plain form: of each direction's logits the log-softmax, and of one both more."""
    return 4 * 4 * pairs ** 2


def free_bytes(device):
    """Memory that a new process may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def status_bytes(name):
    """VmRSS (resident now) or VmHWM (most ever resident) of this process, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def one_run(pairs, chunk, device):
    """Loss and gradients once -> {"seconds", "bytes"}."""
    def loss_and_gradient(image_emb, text_emb):
        scale = torch.tensor(1 / 0.07, device=device, requires_grad=True)
        inputs = image_emb, text_emb, image_emb, text_emb, scale, 0
        if chunk:
            loss = ChunkedLoss.apply(pretrain.contrastive_loss, chunk, *inputs)
        else:
            loss = pretrain.contrastive_loss(*inputs)
        torch.autograd.grad(loss, [image_emb, text_emb, scale])

    def draw(count):  # (count, E) of unit length
        rows = torch.randn(count, WIDTH, device=device)
        return F.normalize(rows, dim=-1).requires_grad_()

    loss_and_gradient(draw(64), draw(64))  # threads and kernels are up
    image_emb, text_emb = draw(pairs), draw(pairs)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status_bytes("VmRSS")
    clock = Clock(device)
    clock.mark()
    loss_and_gradient(image_emb, text_emb)
    clock.mark()
    seconds = sum(clock.laps())
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else status_bytes("VmHWM")
    return {"seconds": seconds, "bytes": peak - before}


def measure(pairs, chunks, rounds, args):
    """{chunk: ([seconds], [bytes])}, each run in a fresh process, the chunks in turns."""
    found = {chunk: ([], []) for chunk in chunks}
    for _ in range(rounds):
        for chunk, (seconds, extra) in found.items():
            run = fresh("tests.bench.loss", f"--device={args.device}", f"--threads={args.threads}",
                        f"--alone={pairs},{chunk}")
            seconds.append(run["seconds"])
            extra.append(run["bytes"])
    return found


def main():
    parser = options(__doc__, rounds=3, pairs="4096,16384,65536", chunks="512,1024,2048,4096",
                     alone="")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.chunks, args.rounds = "256,1024", "128,512", 1
    device = start(args)
    if args.alone:
        print(json.dumps(one_run(*map(int, args.alone.split(",")), device)))
        return
    rows, chunks, best = [], [int(chunk) for chunk in args.chunks.split(",")], None
    for pairs in map(int, args.pairs.split(",")):
        fits = plain_bytes(pairs) < 0.8 * free_bytes(device)
        large = best is not None and pairs > 20_000
        tried = [0] * fits + ([best] if large else [c for c in chunks if c < pairs])
        found = measure(pairs, tried, 1 if large else args.rounds, args)
        if not fits:
            rows.append((f"{pairs:,}", "plain", "does not fit", "",
                         f"about {plain_bytes(pairs) / 2**30:.1f}", ""))
        for chunk, (seconds, extra) in found.items():
            middle = statistics.median(extra)
            rows.append((f"{pairs:,}", chunk or "plain", spread(seconds),
                         ratio(found[0][0], seconds) if fits else "",
                         f"{middle / 2**30:.2f}",
                         f"{statistics.median(found[0][1]) / middle:.1f}" if fits else ""))
        best = min((chunk for chunk in found if chunk), key=lambda c: statistics.median(found[c][0]))
        print(f"{pairs:,} pairs: the fastest chunk is {best}", flush=True)
    table(("pairs", "chunk", "seconds", "times faster", "extra GiB", "times less"), rows)


if __name__ == "__main__":
    main()
