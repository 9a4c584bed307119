"""Reads and decodes every pair of a folder of shards once; names what is bad, exit 1 if any is.

    python -m data.prepare.check FOLDER
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
from data.shards import find_shards


@dataclass
class Config:
    """No settings."""


def check_shard(folder, shard):
    """How many samples of a shard can be trained on, and [(reason, name)] of the others."""
    samples, problems = read_shard(folder, shard)
    good = len(samples)
    with open(Path(folder, shard), "rb") as file:
        for key, image_at, image_size, *_ in samples:
            try:
                decode(os.pread(file.fileno(), image_size, image_at))
            except BadImage as bad:
                name = f"{shard}:{key.decode(errors='replace')}"
                problems.append((f"image: {bad}", name))
                good -= 1
    return good, problems


def main(argv=None):
    _, folders = load_config(Config, globals(), argv)
    if len(folders) != 1:
        raise ValueError(f"takes one folder of shards, not {len(folders)}")
    shards, pairs, problems = find_shards(folders[0]), 0, {}
    progress = Progress("checking", len(shards), "shards")
    workers = workers_for(size for size, _ in shards.values())
    for good, some in in_order(partial(check_shard, folders[0]), shards, workers):
        pairs += good
        add_problems(problems, some)
        progress.add()
    print(f"{folders[0]}: {pairs:,} good pairs", *report(problems), sep="\n")
    if problems.keys() - {FROM_JSON}:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
