"""The bench of ideas: a skewed world. Pairs that name a rare shape are kept to one in twenty.

    python pretrain.py configs/toy.py tests/bench/ideas_skewed.py              # plain
    python pretrain.py configs/toy.py tests/bench/ideas_skewed.py --balanced   # and metaclip

Six of the twelve shapes are rare. --balanced applies configs/ideas/metaclip.py's choice to what is
left. A pair whose caption is wrong is judged by its caption, as in any crawl.
"""
import re

import numpy as np

from configs.ideas import metaclip
from data.prepare.toy import WORDS

balanced: bool = False
at_most: int = 500   # metaclip's t
_RARE = {word for entry in WORDS["shape"][6:] for word in entry}


class _Some:
    """Some pairs of shards, as metaclip's choose_pairs asks for them."""

    def __init__(self, shards, numbers):
        self.shards, self.numbers = shards, numbers

    def __len__(self):
        return len(self.numbers)

    def caption_count(self, i):
        return self.shards.caption_count(self.numbers[i])

    def ids(self, i, line):
        return self.shards.ids(self.numbers[i], line)


def _skewed(shards, seed):
    """Numbers of the pairs of the skewed world, the same for plain and balanced."""
    rng = np.random.default_rng(seed)
    numbers = []
    for i in range(len(shards)):
        words = set(re.findall(r"\w+", shards.captions(i)[0].lower()))
        if _RARE.isdisjoint(words) or rng.random() < 0.05:
            numbers.append(i)
    return np.array(numbers, np.int64)


def choose_pairs(shards, config):
    numbers = _skewed(shards, config.seed)
    if config.balanced:
        numbers = numbers[metaclip.choose_pairs(_Some(shards, numbers), config)]
    return numbers
