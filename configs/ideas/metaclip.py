"""MetaCLIP: choose pairs so that no word of the captions is far more frequent than the others.

    python pretrain.py configs/toy.py configs/ideas/metaclip.py --at_most=500

An entry that n pairs hold is drawn in each of them with probability t / max(n, t). A pair
stays if one of its entries is drawn (arXiv 2309.16671, their code). So rare words keep all
their pairs; pairs of frequent words alone become fewer. If t is the number of pairs, all stay.
Left out: 500,000 entries from WordNet and Wikipedia; here each token of the vocabulary is one.
"""
import numpy as np

out_dir = "out/metaclip"
at_most: int = 500   # t, how often an entry is drawn at most, on average; theirs is 20,000


def _entries(shards, i):
    captions = [shards.ids(i, line) for line in range(shards.caption_count(i))]
    return np.unique(np.concatenate(captions))


def choose_pairs(shards, config):
    if config.at_most < 1:
        raise ValueError(f"at_most={config.at_most}: must be 1 or more")
    counts = np.zeros(2 ** 16, np.int64)  # token ids are stored in 16 bits
    for i in range(len(shards)):
        counts[_entries(shards, i)] += 1
    probability = config.at_most / np.maximum(counts, config.at_most)
    rng = np.random.default_rng(config.seed)
    chosen = []
    for i in range(len(shards)):
        entries = _entries(shards, i)
        if (rng.random(len(entries)) < probability[entries]).any():
            chosen.append(i)
    return np.array(chosen, np.int64)
