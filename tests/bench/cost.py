"""How cost grows: seconds and bytes per pair against number of pairs, batch, and model size.

    python -m tests.bench.cost                       # about 10 minutes on 2 cores
    python -m tests.bench.cost --models=ViT-B-32,ViT-L-14,ViT-H-14 --batches=128,1024 --device=cuda
    python -m tests.bench.cost --simulated=1000000,10000000,15000000    # an index without pictures

Number of pairs: time and disk for the index, time to open it, time and memory for an epoch's order,
time to read one pair at random (shards of one small JPEG, in the disk cache: what is left is our
own work). Batch: one update of --model. Model size: one update at the first of --batches. Each
update is the second one of a fresh process; its memory is that process's peak. A simulated index
has arrays of the right lengths, all zeros, in sparse files, and is opened in a fresh process: what
is measured is our work, not the disk's. A column that
stays level grows in proportion; the README's limits follow from the ones that do not.
"""
import json
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from data.order import epoch_order
from data.prepare.tars import write_shards
from data.shards import FORMAT, SAMPLE, Shards, find_shards, index_shards
from model import SIZES, flops_per_pair
from tests.bench import fresh, interleave, options, spread, start, table, totals
from tests.bench.loader import PLAIN, Words, draw_jpeg, pairs_of
from tests.bench.loss import status_bytes
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


def write_simulated_index(folder, count):
    """An index of `count` pairs, a caption of 17 tokens each, beside a shard that has none."""
    words = Words()
    write_shards(folder, [("0", "jpg", b"no picture", ["x"])])
    place = Path(folder, "index", words.fingerprint)
    place.mkdir(parents=True)
    for name, dtype, length in (("samples", SAMPLE, count), ("keys", np.uint8, 9 * count),
                                ("ids", np.uint16, 17 * count), ("starts", np.int64, count + 1)):
        np.lib.format.open_memmap(place / f"{name}.npy", "w+", dtype, (length,))
    (place / "index.json").write_text(json.dumps({
        "format": FORMAT, "fingerprint": "none", "shards": find_shards(folder),
        "samples": count, "problems": {}}))
    return sum(path.stat().st_size for path in place.iterdir())


def open_simulated(folder):
    """Seconds to open the index, to order an epoch, and a pair's row; growth of memory."""
    def memory():
        return status_bytes("VmRSS")

    before, began = memory(), time.perf_counter()
    shards = Shards(folder, Words())
    opened, grown = time.perf_counter() - began, memory() - before
    before, began = memory(), time.perf_counter()
    order = epoch_order(0, 0, len(shards))
    ordered, order_grown = time.perf_counter() - began, memory() - before
    began = time.perf_counter()
    for sample in order[:100_000]:
        shards.ids(sample, 0)
    return {"open": opened, "open bytes": grown, "order": ordered, "order bytes": order_grown,
            "row": (time.perf_counter() - began) / min(100_000, len(shards))}


def simulated_row(count, rounds):
    """A row of the table of simulated indexes: medians of `rounds` fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        disk = write_simulated_index(folder, count)
        runs = [fresh("tests.bench.cost", f"--alone={folder}") for _ in range(rounds)]

    def column(name, unit, factor=1):
        return spread([run[name] / factor for run in runs], unit)
    return (f"{count:,}", f"{disk / 2**20:,.0f} MiB", column("open", "ms"),
            column("open bytes", "MiB", 2**20), column("order", "s"),
            column("order bytes", "MiB", 2**20), column("row", "us"))


def main():
    args = options(__doc__, rounds=3, pairs="1000,10000,50000", batches="8,32,128",
                   models="toy,ViT-B-32,ViT-B-16", model="ViT-B-32", dtype="float32",
                   simulated="", alone="").parse_args()
    if args.alone:
        print(json.dumps(open_simulated(args.alone)))
        return
    if args.simulated:
        start(args)
        counts = [int(count) for count in args.simulated.split(",")]
        table(("pairs", "index on disk", "open", "its memory", "order of an epoch",
               "its memory", "ids of a pair"), [simulated_row(n, args.rounds) for n in counts])
        return
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
