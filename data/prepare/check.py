"""Reads and decodes every pair of a folder of shards once; names what is bad, exit 1 if any is.

    python -m data.prepare.check FOLDER
"""
import argparse
import os
import sys
from pathlib import Path

from data.log import Progress, run_main
from data.shards import (_add_problems, _find_shards, _in_parallel, _name, index_shards,
                         read_shard, report)


def check_shards(folder):
    """Read and decode everything once, in parallel; print and return what is wrong.

    Needs no index and makes none. FOLDER/held_out is a folder of its own. Returns
    {reason: {"count", "examples"}}, empty when all is well.
    """
    sizes = {name: size for name, (size, _) in _find_shards(folder).items()}
    total, jobs = sum(sizes.values()), [Path(folder) / name for name in sizes]
    progress, pairs, problems = Progress("checking", total / 1e6, "MB"), 0, {}
    for size, (good, some) in zip(sizes.values(), _in_parallel(_check_shard, jobs, total)):
        pairs += good
        _add_problems(problems, some)
        progress.add(size / 1e6)
    bad = sum(entry["count"] for entry in problems.values())
    print(f"checked {folder}: {pairs:,} good pairs in {len(sizes)} shards, {bad:,} problems",
          *report(problems), sep="\n")
    return problems


def _check_shard(path):
    """How many samples of a shard can be trained on, and {reason: [names]} of the others."""
    from data.images import (  # here, as indexing should not wait for torch
        BadImage,
        decode,
    )
    samples, problems = read_shard(path)
    good = 0
    with open(path, "rb") as file:
        for key, (at, size), _, _ in samples:
            try:
                decode(os.pread(file.fileno(), size, at))
                good += 1
            except BadImage as bad:
                problems.setdefault(f"image: {bad.reason}", []).append(_name(path, key))
    return good, problems


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.shards",
                                     description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("index", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocabulary", help="index: a .tiktoken file, to store token ids too")
    options = parser.parse_args(argv)
    if options.command == "check":
        sys.exit(1 if check_shards(options.folder) else 0)
    from data.text import Tokenizer
    tokenizer = Tokenizer(options.vocabulary) if options.vocabulary else None
    print(f"{index_shards(options.folder, tokenizer):,} pairs are indexed")


if __name__ == "__main__":
    run_main(main)
