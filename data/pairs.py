"""Image-caption batches whose content depends on (seed, epoch, position) and on nothing else.

The sample at a position is `epoch_order(seed, epoch, n)[position]`; its caption, crop and further
augmentation are drawn by `sample_rng(seed, epoch, sample)`. Ranks, workers and resuming change who
makes a sample and when, never which or how.

    pairs = Pairs(folder, tokenizer, image_size, seed, context_length, Augmentation(), pick_caption)
    order = PairBatches(len(pairs), batch_size, rank, world_size, start_step, stop_step)
    for batch in load_batches(pairs, order, workers=8): ...

n pairs, b of them in a batch of this rank, L text tokens, S image side. Each process keeps the
order of one epoch: 4 bytes a pair, 60 MB at 15 million.
"""
import math
import os
import shutil
import signal
from collections import Counter

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from data.images import (DRAWS, Augmentation, BadImage, decode, draw_augmentation,
                         eval_image, train_image)
from data.order import epoch_order, sample_rng
from data.shards import Shards, index_shards

GIVE_UP = 1000  # bad images in a row: a folder of nothing else would be searched for days
SHARED_MEMORY = "/dev/shm"  # where worker processes leave their batches


class Pairs(Dataset):
    """The pairs of a folder of shards, made into batches; builds the index if there is none yet.

    tokenizer: data.text.Tokenizer. image_size: S. context_length: L.
    augmentation: data.images.Augmentation, or None for evaluation's `eval_image` and the first
    caption. pick_caption(count, rng) -> int chooses among an image's captions.
    limit: only the first so many pairs; 0: all.
    """

    def __init__(self, folder, tokenizer, image_size, seed, context_length, augmentation,
                 pick_caption, limit=0):
        index_shards(folder, tokenizer)
        self.shards = Shards(folder, tokenizer)
        self.count = min(limit or len(self.shards), len(self.shards))
        self.start, self.end = tokenizer.start, tokenizer.end
        self.image_size, self.seed, self.context_length = image_size, seed, context_length
        self.augmentation, self.pick_caption = augmentation, pick_caption
        self.order_of, self.order = None, None  # an epoch, and its order

    def __len__(self):
        return self.count

    @property
    def fingerprint(self):
        """Of the shards' content; a checkpoint remembers it."""
        return self.shards.fingerprint

    def name(self, sample):
        """Where a sample lies: "00000.tar:key"."""
        return self.shards.name(sample)

    def sample_at(self, epoch, position):
        """The sample number at a position of an epoch."""
        if self.order_of != epoch:
            self.order_of, self.order = epoch, epoch_order(self.seed, epoch, self.count)
        return int(self.order[position % self.count])

    def __getitems__(self, places):
        """[(epoch, position), ...] -> one batch, a dict:

        images (b, 3, S, S) uint8; tokens (b, L) int64, zero padded; draws (b, 11) float32 for
        `augment_batch`; samples (b,) int64, the pairs in it; bad [(name, reason), ...], the pairs
        that should be in it but hold no picture: the next pair of the epoch stands in for each.
        """
        b, S = len(places), self.image_size
        images = torch.empty((b, 3, S, S), dtype=torch.uint8)
        if get_worker_info():  # decode into the memory it will be handed over in: one copy less
            images.share_memory_()
        tokens = np.zeros((b, self.context_length), np.int64)
        draws, samples, bad = np.zeros((b, DRAWS), np.float32), np.zeros(b, np.int64), []
        for row, (epoch, position) in enumerate(places):
            samples[row], images[row], ids, draws[row] = self._find(epoch, position, bad)
            ids = ids[:self.context_length - 2]  # long captions keep their end token
            tokens[row, 0], tokens[row, len(ids) + 1] = self.start, self.end
            tokens[row, 1:len(ids) + 1] = ids
        return {"images": images, "tokens": torch.from_numpy(tokens), "bad": bad,
                "draws": torch.from_numpy(draws), "samples": torch.from_numpy(samples)}

    def _find(self, epoch, position, bad):
        """The first good sample from a position on: number, image, token ids, device draws.

        Only the pair at the position itself is noted as bad; the ones after it have positions of
        their own, so that each is noted once an epoch, whatever the batches.
        """
        reasons = Counter()
        for step in range(min(GIVE_UP, self.count)):
            sample = self.sample_at(epoch, position + step)
            try:
                return sample, *self._make(epoch, sample)
            except BadImage as error:
                reasons[error.reason] += 1
                if step == 0:
                    bad.append((self.name(sample), error.reason))
        raise ValueError(f"{self.shards.folder}: {sum(reasons.values())} images in a row are bad "
                         f"({_most_common(reasons)}); run python -m data.shards check on it")

    def _make(self, epoch, sample):
        """Image (3, S, S) uint8, token ids (n,) and device draws (11,) of one sample."""
        data, rng = self.shards.image(sample), sample_rng(self.seed, epoch, sample)
        if self.augmentation is None:
            image = eval_image(decode(data), self.image_size)
            return image, self.shards.ids(sample, 0), draw_augmentation(Augmentation(), rng)
        # always in this order, so that each draw keeps its value when a later one changes
        caption = self.pick_caption(self.shards.caption_count(sample), rng)
        image = train_image(data, self.image_size, self.augmentation, rng)
        return image, self.shards.ids(sample, caption), draw_augmentation(self.augmentation, rng)


class HeldOut:
    """Pairs to look at, never to train on: image(i) and the first caption of each, in their order.

    An image that cannot be decoded is an error: what is measured does not grow quietly smaller.
    """

    def __init__(self, folder):
        index_shards(folder)
        self.shards = Shards(folder)
        self.captions = [self.shards[i][1][0] for i in range(len(self.shards))]

    def __len__(self):
        return len(self.shards)

    def image(self, i):
        """Picture i as Pillow RGB, of its own size."""
        try:
            return decode(self.shards.image(i))
        except BadImage as error:
            raise ValueError(f"{self.shards.folder}: {self.shards.name(i)}: {error}") from None


class PairBatches(Sampler):
    """Yields [(epoch, position), ...]: this rank's contiguous part of each batch of n pairs.

    batch_size counts all ranks. Steps go from start_step to before stop_step; the pairs that do
    not fill a batch at the end of an epoch are left out. Raises ValueError for a batch of more than
    n.
    """

    def __init__(self, n, batch_size, rank, world_size, start_step, stop_step):
        assert batch_size % world_size == 0, "Ranks.share() refuses such a batch"
        if batch_size > n:
            raise ValueError(f"batch_size={batch_size} is more than the {n} pairs there are; "
                             f"take at most {n}, or more pairs")
        self.steps, self.batch_size = range(start_step, stop_step), batch_size
        self.steps_per_epoch = n // batch_size
        self.share = batch_size // world_size
        self.first = rank * self.share

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        for step in self.steps:
            epoch, step = divmod(step, self.steps_per_epoch)
            first = step * self.batch_size + self.first
            yield [(epoch, position) for position in range(first, first + self.share)]


def load_batches(pairs, batches, workers, pin_memory=False):
    """Iterator over the batches that `batches` (PairBatches) names, made in worker processes.

    Raises ValueError when they would not fit in shared memory.
    """
    check_shared_memory(workers, batches.share, pairs.image_size)
    if workers and not torch.cuda.is_available():  # a core each: the toy's 753 -> 1,041 pairs/s
        spare = len(os.sched_getaffinity(0)) - workers
        torch.set_num_threads(max(1, min(spare, torch.get_num_threads())))
    return iter(DataLoader(pairs, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory,
                           collate_fn=as_loaded, worker_init_fn=_in_worker))


def as_loaded(batch):
    """For DataLoader's collate_fn: `Pairs` makes whole batches, so there is nothing to do."""
    return batch


def _in_worker(_):
    """Ctrl-C and SIGTERM are for the loop, which finishes its step and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def check_shared_memory(workers, batch_size, image_size):
    """Raise ValueError if the batches that wait for the loop cannot lie in shared memory.

    batch_size: of one rank; all ranks of the machine are counted. A worker has two batches ready;
    one more is in use and one on its way. Images only: tokens add half a percent. A full /dev/shm
    kills workers without a word.
    """
    if workers == 0 or not os.path.isdir(SHARED_MEMORY):
        return
    batches = (2 * workers + 2) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun
    need = batches * batch_size * 3 * image_size**2
    free = shutil.disk_usage(SHARED_MEMORY).free
    if need > free:
        raise ValueError(
            f"workers={workers} keep {batches} batches of {batch_size} images in {SHARED_MEMORY}: "
            f"{need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; give the container more "
            f"(docker --shm-size) or take fewer workers")


class BadSamples:
    """Counts and names the pairs that were replaced; stops a run that has too many.

    Names and reasons go to out_dir/bad_samples.tsv, each pair once. Each rank has its own object
    and all write to the one file; a pair that two ranks meet in two epochs may be in it twice.
    before: {reason: count} of the run so far, from its checkpoint.
    """

    LIMIT, FROM = 0.01, 1000  # share of the samples seen; not judged before so many

    def __init__(self, out_dir, before=()):
        self.path = os.path.join(out_dir, "bad_samples.tsv")
        self.before, self.here, self.named = Counter(dict(before)), Counter(), set()
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                self.named = {line.split("\t")[0] for line in file}

    @property
    def total(self):
        """How many this rank has met since the run was started or resumed."""
        return self.here.total()

    def add(self, bad):
        """Note a batch's [(name, reason), ...]."""
        for name, reason in bad:
            self.here[reason] += 1
            name = " ".join(name.split())  # a tab or a line end would break the table
            if name not in self.named:
                self.named.add(name)
                os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(f"{name}\t{reason}\n")

    def counts(self, ranks):
        """{reason: count} over all ranks and the runs before; every rank must ask."""
        return dict(sum(ranks.collect(self.here), self.before))

    def check(self, total, seen, ranks):
        """Raise ValueError on every rank if there are too many.

        total: `total` summed over ranks. seen: samples of the whole run, on all ranks.
        """
        total += self.before.total()
        if seen >= self.FROM and total > self.LIMIT * seen:
            raise ValueError(
                f"{total:,} of {seen:,} samples had no usable image, more than {self.LIMIT:.0%}: "
                f"{_most_common(self.counts(ranks))}; see {self.path}, and run "
                f"python -m data.shards check on the folder")


class BadSteps:
    """Names the samples of steps whose gradient was not finite; stops a run after five in a row.

    Such a step leaves the weights as they were (pretrain.py). What add() takes stays on the device
    until check() asks, at log steps: the loop need not wait. grad_norm is that of the gradient
    averaged over ranks, equal on all of them; so all come to the same conclusion.
    """

    def __init__(self, pairs):
        self.name_of, self.steps, self.in_a_row = pairs.name, [], 0

    def add(self, step, samples, embeddings, grad_norm):
        """Note step (from 0): samples (b,) int64, their embeddings (b, E), grad_norm ()."""
        self.steps.append((step, samples, embeddings.isfinite().all(1), grad_norm))

    def check(self, ranks, say):
        """Say which of the noted steps were skipped; ValueError at five in a row."""
        for step, samples, finite, grad_norm in self.steps:
            self.in_a_row = 0 if math.isfinite(grad_norm) else self.in_a_row + 1
            if self.in_a_row:
                names = ranks.collect([self.name_of(i) for i in samples[~finite.cpu()].tolist()])
                names = ", ".join(sum(names, [])[:8]) or "all embeddings are finite"
                say(f"step {step + 1} skipped, its gradient norm is {float(grad_norm)}: {names}")
            if self.in_a_row == 5:
                raise ValueError(f"no finite gradient in five steps up to {step + 1}; lower lr or "
                                 "set dtype=float32, and go on from the last checkpoint")
        self.steps = []


def _most_common(reasons):
    return ", ".join(f"{count:,} x {reason}" for reason, count in Counter(reasons).most_common(5))
