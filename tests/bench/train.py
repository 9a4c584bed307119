"""pretrain.py end to end with its loader: pairs a second, and the share of time it waits for data.

    python -m tests.bench.train --model=toy --batch=128 --steps=200
    python -m tests.bench.train --model=ViT-B-32 --batch=32 --steps=20 --dtype=bfloat16
    python -m tests.bench.train --model=ViT-B-32 --batch=1024 --workers=8,16 --device=cuda --compile

Runs are processes of their own, in turns; figures are those of log.jsonl, the first fifth of the
steps left out. "toy" trains on the toy world; other models on drawn JPEGs (tests/bench/loader.py)
with CLIP's vocabulary and captions of usual lengths, cropped as the paper does, but not jittered.
"""
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from data.prepare.vocabulary import published_merges, read_merges, tiktoken_text
from data.prepare.tars import write_shards
from data.text import Tokenizer
from tests.bench import environment, options, spread, start, table
from tests.bench.loader import draw_jpeg
from tests.bench.text import draw_captions


def write_pairs(folder, count):
    """`count` drawn pairs and CLIP's vocabulary; returns pretrain.py's arguments for them."""
    vocabulary, rng = folder / "clip.tiktoken", np.random.default_rng(0)
    vocabulary.write_text(tiktoken_text(read_merges(published_merges())))
    captions = draw_captions(Tokenizer(vocabulary), count, 0.0, random.Random(0))
    write_shards(folder / "pairs", ((f"{i:06d}", "jpg", draw_jpeg(rng), [caption])
                                    for i, caption in enumerate(captions)))
    return [f"--data={folder}/pairs", f"--vocabulary={vocabulary}", "--crop=(0.2, 1.0)"]


def write_toy(folder, count):
    """A toy world of `count` pairs; returns pretrain.py's arguments for it."""
    subprocess.run([sys.executable, "-m", "data.prepare.toy", f"--out={folder}/toy", f"--pairs={count}",
                    "--held_out=20", "--triplets=20", "--per_set=20"], check=True,
                   stdout=subprocess.DEVNULL)
    return ["configs/toy.py", f"--data={folder}/toy/pairs", "--held_out=", "--keep_at=()",
            f"--vocabulary={folder}/toy/vocabulary/toy.tiktoken"]


def run(args, data, workers, out_dir):
    """One run of pretrain.py -> its log records after the first fifth."""
    subprocess.run([sys.executable, "pretrain.py", *data, f"--out_dir={out_dir}",
                    f"--model={args.model}", f"--batch_size={args.batch}", f"--dtype={args.dtype}",
                    f"--max_steps={args.steps}", f"--log_every={max(args.steps // 5, 1)}",
                    f"--save_every={args.steps}", "--warmup_steps=1", f"--workers={workers}",
                    f"--compile={args.compile}"],
                   check=True, stdout=subprocess.DEVNULL, env=environment(args.device))
    records = [json.loads(line) for line in Path(out_dir, "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["step"] > args.steps // 5]


def main():
    parser = options(__doc__, rounds=2, model="toy", batch=128, steps=100, workers="0,1,2",
                     dtype="float32", count=4096)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.model, args.batch, args.steps, args.rounds, args.count = "toy", 16, 5, 1, 100
        args.workers = "0,1"
    start(args)
    workers = [int(count) for count in args.workers.split(",")]
    records = {count: [] for count in workers}
    with tempfile.TemporaryDirectory() as folder:
        write = write_toy if args.model == "toy" else write_pairs
        data = write(Path(folder), max(args.count, args.batch))
        for number in range(args.rounds):
            for count in workers:
                records[count] += run(args, data, count, f"{folder}/out_{number}_{count}")
    table((f"{args.model}, batch {args.batch}, {args.dtype}; loader processes", "pairs/s",
           "share of time waiting for data"),
          [(count, spread([record["pairs_per_s"] for record in found], ""),
            spread([100 * record["data_wait"] for record in found], "%"))
           for count, found in records.items()])


if __name__ == "__main__":
    main()
