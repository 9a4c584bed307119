"""Which sample comes when, and the generator of everything drawn for it: functions of the seed."""
import numpy as np


def epoch_order(seed, epoch, n):
    """The permutation of an epoch: (n,) uint32 sample numbers by position."""
    order = np.arange(n, dtype=np.uint32)
    _generator(seed, epoch, 1, 0).shuffle(order)
    return order


def sample_rng(seed, epoch, sample):
    """The generator of everything that is drawn for one sample in one epoch."""
    return _generator(seed, epoch, 0, sample)


def _generator(seed, epoch, purpose, number):
    """Philox is made to be keyed: nearby keys and counters give unrelated streams.

    The two upper words of the counter are ours; drawing counts in the two lower ones.
    """
    return np.random.Generator(np.random.Philox(
        key=np.array([seed, epoch], np.uint64),
        counter=np.array([0, 0, purpose, number], np.uint64)))
