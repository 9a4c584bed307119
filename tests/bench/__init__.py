"""Measurements, not tests: nothing here asserts a time, and pytest collects nothing.

    python -m tests.bench.step --quick        # every bench has --quick: seconds instead of minutes

Each prints the machine and the versions first and one Markdown table last, ready for the README.
Cases that are compared run interleaved (A B A B ...), in one process or in fresh ones, after a
warm-up that is not counted. A figure is the median of its rounds, (lowest-highest) behind it.
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time

import configs  # before torch: the environment that the scripts run in, peers too
import torch

from model import SIZES


def options(doc, rounds=5, **defaults):
    """Parser of a bench: --quick, --device, --threads, --rounds, and --name=default of each other."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run; its figures mean nothing")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=rounds, help="measured runs of each case")
    choices = {"model": tuple(SIZES), "dtype": ("bfloat16", "float32"), "peer": ("open_clip", "none")}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default,
                            choices=choices.get(name))
    return parser


def start(args):
    """Threads as asked for; prints machine and versions; returns the torch.device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device=cuda: torch sees no GPU here; leave it out")
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    print(f"{where}; {os.cpu_count()} cores, {args.threads} threads, load {os.getloadavg()[0]:.1f}; "
          f"torch {torch.__version__}, Python {platform.python_version()}; {args.rounds} rounds"
          + (", --quick: figures mean nothing" if args.quick else ""), flush=True)
    return torch.device(args.device)


def processor():
    """The processor's name, where Linux tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Clock:
    """Seconds between marks. On a GPU the marks are events, so that the queue never runs dry."""

    def __init__(self, device):
        self.cuda, self.marks = device.type == "cuda", []
        if self.cuda:
            torch.cuda.synchronize()  # what was queued before is not ours

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def laps(self):
        """Seconds from each mark to the next."""
        pairs = list(zip(self.marks, self.marks[1:]))
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


def interleave(cases, rounds, device, warmup=1):
    """Run {name: run(mark)} in turns; -> {name: [laps of round 1, ...]}.

    A case calls mark() between its phases, if it has any; start and end are marked here.
    """
    laps = {name: [] for name in cases}
    for number in range(-warmup, rounds):
        for name, run in cases.items():
            clock = Clock(device)
            clock.mark()
            run(clock.mark)
            clock.mark()
            if number >= 0:
                laps[name].append(clock.laps())
    return laps


def totals(laps):
    """[laps of each round] -> [seconds of each round]."""
    return [sum(lap) for lap in laps]


def spread(values, unit="s", digits=3):
    """'12.3 ms (12.1-12.9)': the median of seconds, or of numbers in any other unit."""
    factor = {"s": 1, "ms": 1e3, "us": 1e6}.get(unit, 1)
    low, middle, high = (f"{value * factor:.{digits}g}" if value * factor < 1000
                         else f"{value * factor:,.0f}"
                         for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} {unit}".strip() + (f" ({low}-{high})" if len(values) > 1 else "")


def ratio(slow, fast):
    """'1.83 (1.79-1.88)': how many times faster, round by round, so that drift cancels."""
    return spread([a / b for a, b in zip(slow, fast)], "")


def table(head, rows):
    """Print a Markdown table: the end of every bench."""
    print()
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def environment(device):
    """Environment for child processes: with --device=cpu they see no GPU."""
    return dict(os.environ) if device == "cuda" else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def fresh(module, *arguments):
    """Run `python -m module arguments` alone; its last line, JSON, as an object."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------- a batch to measure on

def caption_lengths(count, context_length=77):
    """Tokens of `count` captions, start and end included: (count,) int64, mean 16, a long tail.

    Caption sets have means of 13 to 20 tokens, while the longest of 32 captions has about 54 and
    of 256 or more 76 to 77. So has a log-normal distribution with median 13.3 and sigma 0.65, cut
    at 77. Its (i + 1/2) / count quantiles, in an order drawn with seed 0, make every batch of a
    size alike: no luck with lengths.
    """
    normal = statistics.NormalDist(math.log(13.3), 0.65)  # of the length's logarithm
    quantiles = torch.tensor([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    lengths = quantiles.exp().round().long().clamp(3, context_length)
    return lengths[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


def make_batch(config, count, device):
    """Normalised images (B, 3, S, S) on the device and token ids (B, L) on the host, seeded."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, config.image_size, config.image_size, generator=generator)
    lengths = caption_lengths(count, config.context_length)[:, None]  # (B, 1)
    places = torch.arange(config.context_length)                      # (L,)
    words = torch.randint(1, config.vocab_size - 2, (count, config.context_length),
                          generator=generator)                        # (B, L)
    tokens = torch.where(places < lengths - 1, words, 0)
    tokens[places == lengths - 1] = config.vocab_size - 1             # the end token, highest id
    tokens[:, 0] = config.vocab_size - 2
    return images.to(device), tokens
