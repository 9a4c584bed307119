"""Everything that a GPU decides, in one command and at most 8 minutes.

    python -m tests.bench.gpu            # one GPU; says so and ends well where there is none
    python -m tests.bench.gpu --quick    # the same lines on the CPU with the toy model

Each part runs in a process of its own with a time limit; the limits add up to less than 8
minutes. A part that does not end in time, or fails, keeps the rows it has and one that says so,
and the next one begins. Towers and augmentation are measured as they are and compiled. open_clip
runs as its trainer does, not compiled, where it is installed (tests/bench/peer.py). Prints one
table for docs/speed.md, then the README's line.
"""
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data.images import augment_batch, draw_augmentation
from data.prepare.tars import write_shards
from data.ranks import usable_cores
from model import CLIP, SIZES, flops_per_pair, peak_flops
from tests.bench import interleave, make_batch, options, spread, start, table, totals
from tests.bench.evaluate import image_cases
from tests.bench.loader import PAPER, UsualRoute, all_cores, draw_jpeg, pairs_of
from tests.bench.loss import one_run
from tests.bench.peer import PeerStep, load_peer, peer_clip
from tests.bench.step import OurStep, eager
from tests.bench.train import run, write_toy

LIMITS = {  # seconds; compiling a tower takes about a minute
    "ViT-B-32": 130, "ViT-B-16": 75, "ViT-L-14": 95, "augmentation": 40, "loss": 20,
    "loader": 40, "evaluation": 30, "toy": 45}
FULL = SimpleNamespace(
    device="cuda", compile=True, rounds=5, models={"ViT-B-32": ("ViT-B-32", (2304, 1024, 512)),
                                                   "ViT-B-16": ("ViT-B-16", (512,)),
                                                   "ViT-L-14": ("ViT-L-14", (128,))},
    images=2304, pairs=16384, chunk=2048, pictures=512, part=64, model="ViT-B-32", toy_steps=400)
QUICK = SimpleNamespace(
    device="cpu", compile=False, rounds=1, models={name: ("toy", (4, 8)) for name in
                                                   ("ViT-B-32", "ViT-B-16", "ViT-L-14")},
    images=4, pairs=128, chunk=32, pictures=16, part=4, model="toy", toy_steps=5)
HEAD = ("what", "ours", "beside it", "times", "of peak", "GiB")


def measure(case, settings, device):
    """[seconds] of each round of one case and its peak in GiB; None, "" if it does not fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        laps = interleave({"": case}, settings.rounds, device, warmup=2)[""]
    except torch.OutOfMemoryError:
        return None, ""
    gib = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device.type == "cuda" else ""
    return totals(laps), gib


def rate_row(what, count, ours, other, flops=0, gib=""):
    """A row of HEAD: `count` things in the seconds of each round, ours and the other's."""
    def rates(seconds):
        if seconds is None:
            return "does not fit"
        return spread([count / s for s in seconds], "") if seconds else "-"

    times = of_peak = ""
    if ours and other:
        times = f"{statistics.median(other) / statistics.median(ours):.2f}"
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if ours and flops and peak:
        of_peak = f"{count * flops / statistics.median(ours) / peak:.0%}"
    return [what, rates(ours), rates(other), times, of_peak, gib]


# ------------------------------------------------------------------------------------ the parts

def step_rows(part, settings, device):
    """A training step, bf16: ours, ours compiled, and open_clip's; flops of the real tokens."""
    name, batches = settings.models[part]
    config, open_clip = SIZES[name], load_peer()[0]
    ours = OurStep(config, device, "bfloat16", settings.compile)
    peer = PeerStep(open_clip, config, device, "bfloat16") if open_clip else None
    for batch in batches:
        images, tokens = make_batch(config, batch, device)
        flops = flops_per_pair(config, (tokens.argmax(1) + 1).float().mean().item())

        def plain(mark):
            with eager():
                ours(images, tokens)
        other = measure(lambda mark: peer(images, tokens), settings, device)[0] if peer else []
        for how, case in (("", plain), (", compiled", lambda mark: ours(images, tokens))):
            seconds, gib = measure(case, settings, device)
            yield rate_row(f"step, {name}, batch {batch:,}, bf16{how}, pairs/s", batch, seconds,
                           other, flops, gib)


def augmentation_rows(part, settings, device):
    """The device part of the paper's augmentation, compiled, beside itself as it is."""
    generator, count = np.random.default_rng(0), settings.images
    draws = np.stack([draw_augmentation(PAPER, generator) for _ in range(count)])
    draws = torch.from_numpy(draws).to(device)                              # (B, 11)
    images = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8, device=device)
    made = torch.compile(augment_batch) if settings.compile else augment_batch
    plain = measure(lambda mark: augment_batch(images, draws, PAPER), settings, device)[0]
    seconds, gib = measure(lambda mark: made(images, draws, PAPER), settings, device)
    yield rate_row("augmentation, compiled, images/s", count, seconds, plain, gib=gib)


def loss_rows(part, settings, device):
    """The loss with its gradient: in chunks, beside all logits at once."""
    chunked = one_run(settings.pairs, settings.chunk, device)
    plain = one_run(settings.pairs, 0, device)
    gib = f"{chunked['bytes'] / 2**30:.2f}, beside {plain['bytes'] / 2**30:.2f}"
    yield rate_row(f"loss of {settings.pairs:,} pairs in chunks of {settings.chunk:,}, a second",
                   1, [chunked["seconds"]], [plain["seconds"]], gib=gib)


def loader_rows(part, settings, device):
    """Loader processes on all cores, beside Pillow's route on all cores."""
    rng, cores = np.random.default_rng(0), usable_cores()
    steps, count = 2 * cores, settings.pictures
    samples = [(f"{i:04d}", "jpg", draw_jpeg(rng), ["a caption"]) for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, samples)
        pairs, seconds = pairs_of(folder, PAPER), []
        for dataset in (pairs, UsualRoute(pairs, PAPER)):
            case = all_cores(dataset, steps, settings.part, cores)
            laps = interleave({"": case}, 1, device, warmup=0)[""]
            seconds.append([lap[-1] for lap in laps])
    yield rate_row(f"loader, the paper's, {cores} cores, images/s", steps * settings.part,
                   *seconds)


def evaluation_rows(part, settings, device):
    """Embedding images in bf16, beside open_clip in bf16."""
    config, open_clip = SIZES[settings.model], load_peer()[0]
    clip = CLIP(config).to(device).eval()
    peer = peer_clip(open_clip, config).to(device).eval() if open_clip else None
    batch = min(512, settings.images)
    sizes = SimpleNamespace(images=4 * batch, batch=batch)
    cases = image_cases(clip, peer, sizes, device)
    seconds, gib = measure(cases["ours", "bfloat16"], settings, device)
    other = measure(cases["open_clip", "bfloat16"], settings, device)[0] if peer else []
    yield rate_row(f"embedding images, {settings.model}, bf16, images/s", 4 * batch, seconds, other,
                   gib=gib)


def toy_rows(part, settings, device):
    """pretrain.py on the toy world, loader and all."""
    args = SimpleNamespace(model="toy", batch=128, dtype="bfloat16", steps=settings.toy_steps,
                           compile=False, device=device.type)
    with tempfile.TemporaryDirectory() as folder:
        records = run(args, write_toy(Path(folder), 256), -1, f"{folder}/run")
    waited = statistics.median(record["data_wait"] for record in records)
    rate = spread([record["pairs_per_s"] for record in records], "")
    yield [f"toy end to end, {waited:.0%} waiting for data, pairs/s", rate, "-", "", "", ""]


ROWS = {"augmentation": augmentation_rows, "loss": loss_rows, "loader": loader_rows,
        "evaluation": evaluation_rows, "toy": toy_rows}


# ------------------------------------------------------------------------------------- the whole

def rows_of(part, limit, quick):
    """Rows that a part prints in a process of its own; the last says if it failed or was slow."""
    command = [sys.executable, "-m", "tests.bench.gpu", f"--part={part}"]
    if quick:
        command.append("--quick")
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    failed = ""
    try:
        output, _ = child.communicate(timeout=limit)
        if child.returncode:
            failed = f"ended with {child.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # with the processes that it started
        output, _ = child.communicate()
        failed = f"not done in {limit} s"
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    if failed:
        rows.append([part, failed, "", "", "", ""])
    return rows


def main():
    args = options(__doc__, part="").parse_args()
    settings = QUICK if args.quick else FULL
    if settings.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here: nothing was measured; --quick runs the same on the CPU")
        return
    if args.part:
        make_rows = ROWS.get(args.part, step_rows)
        for row in make_rows(args.part, settings, torch.device(settings.device)):
            print(json.dumps(row), flush=True)
            print(*row, sep=" | ", file=sys.stderr, flush=True)  # for those who watch
        return
    args.device = settings.device
    start(args)
    print(load_peer()[1])
    rows = []
    for part, limit in LIMITS.items():
        rows += rows_of(part, limit, args.quick)
        print(f"{part}: done", file=sys.stderr, flush=True)
    table(HEAD, rows)
    fastest = [row for row in rows if row[0].startswith("step") and "compiled" in row[0]][:1]
    for what, ours, other, times, _, _ in fastest:
        print(f"\nREADME: | {what} | {ours} | open_clip {other} | {times} |")


if __name__ == "__main__":
    main()
