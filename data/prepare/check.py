"""Reads and decodes every pair of a folder of shards once; names what is bad, exit 1 if any is.

    python -m data.prepare.check FOLDER [--vocabulary=data/clip.tiktoken]

Needs no index. With a vocabulary it also builds the index with token ids, which pretrain.py
would do by itself. FOLDER/held_out is a folder of its own.
"""
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from configs import load_config
from data.images import BadImage, decode
from data.log import Progress, run_main
from data.prepare.index import FROM_JSON, add_problems, read_shard, report, workers_for
from data.prepare.tars import in_order
from data.shards import find_shards, index_shards, where
from data.text import Tokenizer


@dataclass
class Config:
    vocabulary: str = ""  # a .tiktoken file: build the index, too


def check_shards(folder):
    """Read and decode everything once; print what is wrong, return how much it is."""
    sizes = {name: size for name, (size, _) in find_shards(folder).items()}
    total = sum(sizes.values())
    progress, pairs, problems = Progress("checking", total / 1e6, "MB"), 0, {}
    results = in_order(partial(_check_shard, folder), sizes, workers_for(len(sizes), total))
    for size, (good, some) in zip(sizes.values(), results):
        pairs += good
        add_problems(problems, some)
        progress.add(size / 1e6)
    bad = sum(entry["count"] for reason, entry in problems.items() if reason != FROM_JSON)
    print(f"checked {folder}: {pairs:,} good pairs in {len(sizes)} shards, {bad:,} problems")
    for line in report(problems):
        print(line)
    return bad


def _check_shard(folder, shard):
    """How many samples of a shard can be trained on, and [(reason, name)] of the others."""
    samples, problems = read_shard(folder, shard)
    good = 0
    with open(Path(folder, shard), "rb") as file:
        for key, image_at, image_size, *_ in samples:
            try:
                decode(os.pread(file.fileno(), image_size, image_at))
                good += 1
            except BadImage as bad:
                problems.append((f"image: {bad.reason}", where(shard, key)))
    return good, problems


def main(argv=None):
    config, folders = load_config(Config, globals(), argv)
    if len(folders) != 1:
        raise ValueError(f"takes one folder of shards, not {len(folders)}")
    tokenizer = Tokenizer(config.vocabulary) if config.vocabulary else None
    bad = check_shards(folders[0])
    if tokenizer:
        print(f"{index_shards(folders[0], tokenizer):,} pairs are indexed")
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
