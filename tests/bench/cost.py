"""How cost grows: seconds and bytes per pair against number of pairs, batch, and model size.

    python -m tests.bench.cost                       # about 10 minutes on 2 cores
    python -m tests.bench.cost --models=ViT-B-32,ViT-L-14,ViT-H-14 --batches=128,1024 --device=cuda

Number of pairs: time and disk for the index, time to open it, time and memory for an epoch's order,
time to read one pair at random (shards of one small JPEG, in the disk cache: what is left is our
own work). Batch: one update of --model. Model size: one update at the first of --batches. Each
update is the second one of a fresh process; its memory is that process's peak. A column that
stays level grows in proportion; the README's limits follow from the ones that do not.
"""
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from data.order import epoch_order
from data.prepare.tars import write_shards
from data.shards import index_shards
from model import SIZES, flops_per_pair
from tests.bench import interleave, options, spread, start, table, totals
from tests.bench.loader import PLAIN, Words, draw_jpeg, pairs_of
from tests.bench.step import alone


def pair_costs(count, rounds, device):
    """Rows (what, at, seconds per pair, bytes per pair) for a folder of `count` pairs."""
    rng, words = np.random.default_rng(0), Words()
    jpeg = draw_jpeg(rng)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, ((f"{i:07d}", "jpg", jpeg, ["a caption of usual length"])
                              for i in range(count)))
        shards = sum(path.stat().st_size for path in Path(folder).glob("*.tar"))
        index = totals(interleave({"": lambda mark: index_shards(folder, words)}, 1, device, 0)[""])
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        pairs = pairs_of(folder, PLAIN)
        pick = random.Random(0)

        def read(mark):
            for _ in range(64):
                pairs.shards.image(pick.randrange(count))

        laps = interleave({
            "open": lambda mark: pairs_of(folder, PLAIN),
            "order": lambda mark: epoch_order(0, 0, count), "read": read}, rounds, device)
    order = epoch_order(0, 0, count)
    each = {name: [s / (64 if name == "read" else count) for s in totals(rounds_of)]
            for name, rounds_of in laps.items()}
    at = f"{count:,} pairs"
    return [("index", at, spread([s / count for s in index], "us"), f"{(disk - shards) / count:.0f}"),
            ("open the index", at, spread(each["open"], "us"), ""),
            ("order of an epoch", at, spread(each["order"], "us"), f"{order.nbytes / count:.0f}"),
            ("read a pair", at, spread(each["read"], "us"), f"{shards / count:,.0f}")]


def step_row(what, at, args, model, batch):
    """One row: an update of `model` at `batch`, medians of --rounds fresh processes."""
    settings = SimpleNamespace(**{**vars(args), "model": model, "batch": batch})
    runs = [alone(settings, "all") for _ in range(args.rounds)]
    return (what, at, spread([run["seconds"] / batch for run in runs], "ms"),
            spread([run["bytes"] / batch / 2**20 for run in runs], "MiB"))


def main():
    args = options(__doc__, rounds=3, pairs="1000,10000,50000", batches="8,32,128",
                   models="toy,ViT-B-32,ViT-B-16", model="ViT-B-32", dtype="float32").parse_args()
    if args.quick:
        args.pairs, args.batches, args.models, args.model = "100,200", "4,8", "toy", "toy"
        args.rounds = 1
    device = start(args)
    batches = [int(batch) for batch in args.batches.split(",")]
    rows = []
    for count in map(int, args.pairs.split(",")):
        rows += pair_costs(count, args.rounds, device)
    rows.sort(key=lambda row: row[0])  # stable: each cost with its counts in order
    for batch in batches:
        rows.append(step_row(f"update, {args.model}", f"batch {batch}", args, args.model, batch))
    for name in args.models.split(","):
        work = flops_per_pair(SIZES[name]) / 1e9
        rows.append(step_row(f"update, batch {batches[0]}", f"{name}, {work:,.1f} GFLOP nominal",
                             args, name, batches[0]))
    table(("cost", "at", "time per pair", "bytes per pair"), rows)


if __name__ == "__main__":
    main()
