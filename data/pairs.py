"""Image-caption batches whose content depends on (seed, epoch, position) and on nothing else.

The sample at a position is `epoch_order(seed, epoch, n)[position]`; its caption, crop and other
draws come from `sample_rng(seed, epoch, sample)` (data/order.py). Ranks, workers and resuming
change who makes a sample and when, never which or how.

    pairs = Pairs(Shards(folder, tokenizer), tokenizer, config, augmentation, pick_caption)
    order = PairBatches(len(pairs), batch_size, rank, world_size, start_step, stop_step)
    for parts in load_batches(pairs, order, workers=8): ...

n pairs, b of them in a part of a batch, L text tokens, S image side. Each process keeps the
order of one epoch: 4 bytes a pair, 60 MB at 15 million.
"""
import hashlib
import math
import os
import shutil
import signal
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from data.images import BadImage, decode, draw_augmentation, train_image
from data.order import epoch_order, sample_rng
from data.ranks import usable_cores
from data.shards import Shards, index_shards

PART = 256  # pairs a loader process makes at a time: a rank's batch may not fit in /dev/shm
GIVE_UP = 1000  # bad images in a row: a folder of nothing else would be searched for days
SHARED_MEMORY = "/dev/shm"  # where loader processes leave what they made


class Pairs(Dataset):
    """The pairs of `shards` (data.shards.Shards with ids), made into batches.

    config: image_size (S), context_length (L) and seed are used; extra_arrays gets all of it.
    augmentation: data.images.Augmentation. pick_caption(count, rng) -> int chooses among an
    image's captions.
    extra_arrays(pairs, sample, caption, rng, config) -> {name: array}: what a recipe adds to a
    sample. chosen: numbers of the pairs to train on, any sequence; None: all.
    """

    def __init__(self, shards, tokenizer, config, augmentation, pick_caption, extra_arrays=None,
                 chosen=None):
        self.shards, self.tokenizer, self.augmentation = shards, tokenizer, augmentation
        self.config = SimpleNamespace(**vars(config))  # can be sent to any process
        self.image_size = config.image_size
        self.pick_caption, self.extra_arrays = pick_caption, extra_arrays
        self.chosen = range(len(shards)) if chosen is None else chosen
        self.order_of, self.order = None, None  # an epoch, and its order

    def __len__(self):
        return len(self.chosen)

    @property
    def fingerprint(self):
        """Of the shards' content and of the choice among it; a checkpoint remembers it."""
        if isinstance(self.chosen, range) and self.chosen == range(len(self.shards)):
            return self.shards.fingerprint
        numbers = np.asarray(self.chosen, np.int64)
        return f"{self.shards.fingerprint}-{hashlib.sha256(numbers).hexdigest()[:16]}"

    def sample_at(self, epoch, position):
        """The sample number at a position of an epoch."""
        if self.order_of != epoch:
            self.order_of, self.order = epoch, epoch_order(self.config.seed, epoch, len(self))
        return int(self.chosen[int(self.order[position % len(self)])])

    def padded(self, ids):
        """Token ids without start and end -> (L,) int64: start, ids, end, zeros."""
        row = np.zeros(self.config.context_length, np.int64)
        ids = ids[:len(row) - 2]  # long captions keep their end token
        row[0], row[len(ids) + 1] = self.tokenizer.start, self.tokenizer.end
        row[1:len(ids) + 1] = ids
        return row

    def __getitems__(self, places):
        """[(epoch, position), ...] -> b pairs, a dict:

        images (b, 3, S, S) uint8; tokens (b, L) int64, zero padded; draws (b, 11) float32 for
        `augment_batch`; samples (b,) int64, the pairs in it; bad [(name, reason), ...], those
        that should be in it but hold no picture: the next pair of the epoch stands in for each;
        and the arrays (b, ...) of extra_arrays.
        """
        b, S = len(places), self.image_size
        images = torch.empty((b, 3, S, S), dtype=torch.uint8)
        if get_worker_info():  # decode into the memory it will be handed over in: one copy less
            images.share_memory_()
        arrays, bad = [], []
        for row, (epoch, position) in enumerate(places):
            images[row], others = self._find(epoch, position, bad)
            arrays.append(others)
        batch = {"images": images, "bad": bad}
        for name in arrays[0]:
            batch[name] = torch.from_numpy(np.stack([others[name] for others in arrays]))
        return batch

    def _find(self, epoch, position, bad):
        """Image and arrays of the first good sample from a position on.

        Only the pair at the position itself is noted as bad: those after it have positions of
        their own, so each is noted once an epoch, whatever the batches.
        """
        reasons = Counter()
        for step in range(min(GIVE_UP, len(self))):
            sample = self.sample_at(epoch, position + step)
            try:
                return self._make(epoch, sample)
            except BadImage as error:
                reasons[str(error)] += 1
                if step == 0:
                    bad.append((self.shards.name(sample), str(error)))
        raise ValueError(f"{self.shards.folder}: {sum(reasons.values())} images in a row are "
                         f"bad ({_most_common(reasons)}); python -m data.prepare.check names them")

    def _make(self, epoch, sample):
        """Image (3, S, S) uint8 of one sample, and its arrays by name."""
        data, rng = self.shards.image(sample), sample_rng(self.config.seed, epoch, sample)
        # always in this order, so that each draw keeps its value when a later one changes
        caption = self.pick_caption(self.shards.caption_count(sample), rng)
        image = train_image(data, self.image_size, self.augmentation, rng)
        arrays = {"samples": np.int64(sample),
                  "tokens": self.padded(self.shards.ids(sample, caption)),
                  "draws": draw_augmentation(self.augmentation, rng)}
        if self.extra_arrays:
            arrays |= self.extra_arrays(self, sample, caption, rng, self.config)
        return image, arrays


class HeldOut:
    """Pairs to look at, never to train on: image(i), and the first caption of each.

    An image that cannot be decoded is an error: what is measured does not grow quietly smaller.
    """

    def __init__(self, folder):
        index_shards(folder)
        self.shards = Shards(folder)
        self.captions = [self.shards.captions(i)[0] for i in range(len(self.shards))]

    def __len__(self):
        return len(self.shards)

    def image(self, i):
        """Picture i as Pillow RGB, of its own size."""
        try:
            return decode(self.shards.image(i))
        except BadImage as error:
            raise ValueError(f"{self.shards.folder}: {self.shards.name(i)}: {error}") from None


class PairBatches(Sampler):
    """Yields [(epoch, position), ...]: this rank's share of each batch, part by part.

    batch_size counts all ranks. Steps go from start_step to before stop_step; the pairs that do
    not fill a batch at the end of an epoch are left out. A part has at most PART pairs.
    Raises ValueError for a batch of more than the n pairs.
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
        self.parts = math.ceil(self.share / PART)  # of each batch

    def __iter__(self):
        for step in self.steps:
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            first = step_of_epoch * self.batch_size + self.first
            end = first + self.share
            for start in range(first, end, PART):
                yield [(epoch, position) for position in range(start, min(start + PART, end))]


def load_batches(pairs, batches, workers, pin_memory=False):
    """An iterator over the batches of `batches` (PairBatches), each a list of its parts.

    workers: see loader_processes; they start with the first batch. Raises ValueError, at once,
    when what they have ready would not fit in shared memory.
    """
    workers = loader_processes(workers)
    check_shared_memory(batches, workers, pairs.image_size)
    if workers and not torch.cuda.is_available():  # a core each: the toy's 753 -> 1,041 pairs/s
        spare = usable_cores() - workers
        torch.set_num_threads(max(1, min(spare, torch.get_num_threads())))
    loader = DataLoader(pairs, batch_sampler=batches, num_workers=workers,
                        pin_memory=pin_memory, collate_fn=as_loaded, worker_init_fn=_in_worker)

    def whole_batches():
        parts = iter(loader)
        for _ in batches.steps:
            yield [next(parts) for _ in range(batches.parts)]
    return whole_batches()


def loader_processes(workers):
    """`workers`; for -1 the cores of the machine shared by its ranks, less one each."""
    if workers >= 0:
        return workers
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)


def loader_line(pairs, batches, workers, needed):
    """A line: what a rank's loader can make, timed on 16 pairs, of `needed` pairs/s or None."""
    workers = loader_processes(workers)
    epoch = batches.steps.start // batches.steps_per_epoch
    places = [(epoch, position) for position in range(min(16, len(pairs)))]
    pairs.__getitems__(places[:1])  # finds the order, which forked processes share, and decoders
    began = time.perf_counter()
    pairs.__getitems__(places)
    rate = len(places) / (time.perf_counter() - began) * max(workers, 1)
    line = f"loader: {workers} processes a rank, about {rate:,.0f} pairs/s"
    if needed:
        line += f" of the {needed:,.0f} that the device can take"
    need, free = check_shared_memory(batches, workers, pairs.image_size)
    return f"{line}; {need / 1e9:.1f} of {free / 1e9:.1f} GB of {SHARED_MEMORY}"


def join_parts(parts, device):
    """Parts of a batch -> one dict of tensors; all but int64, which is ids, on the device."""
    batch = {"bad": sum((part["bad"] for part in parts), [])}
    for name in parts[0].keys() - {"bad"}:
        tensors = [part[name] for part in parts]
        if tensors[0].dtype != torch.int64:
            tensors = [tensor.to(device, non_blocking=True) for tensor in tensors]
        batch[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return batch


def split_rows(batch, micro):
    """A batch -> micro-batches of at most `micro` rows, as views of its tensors."""
    parts = []
    for start in range(0, len(batch["samples"]), micro):
        rows = slice(start, start + micro)
        parts.append({name: value[rows] for name, value in batch.items() if name != "bad"})
    return parts


def as_loaded(batch):
    """For DataLoader's collate_fn: `Pairs` makes whole batches, so there is nothing to do."""
    return batch


def _in_worker(_):
    """Ctrl-C and SIGTERM are for the loop, which ends its step and then its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def check_shared_memory(batches, workers, image_size):
    """Bytes of shared memory that the machine's loader processes take, and those free.

    Each has two parts ready; the loop holds a batch's. Tokens add half a percent. Raises
    ValueError if they do not fit: a full /dev/shm would kill the processes without a word.
    """
    if not workers or not os.path.isdir(SHARED_MEMORY):
        return 0, 0
    parts = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * (2 * workers + batches.parts + 1)
    size = min(PART, batches.share)
    need = parts * size * 3 * image_size**2
    free = shutil.disk_usage(SHARED_MEMORY).free
    if need > free:
        raise ValueError(
            f"loader processes keep {parts} x {size} images in {SHARED_MEMORY}: "
            f"{need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; give the container more "
            "(docker --shm-size), or take fewer workers")
    return need, free


class BadSamples:
    """Counts and names the pairs that were replaced; stops a run that has too many.

    Names and reasons go to out_dir/bad_samples.tsv, each pair once. All ranks write to the one
    file; a pair that two ranks meet in two epochs may be in it twice.
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
                try:
                    with open(self.path, "a", encoding="utf-8") as file:
                        file.write(f"{name}\t{reason}\n")
                except OSError as error:
                    print(f"warning: {self.path}: {name} ({reason}) not noted ({error})")

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
                f"{total:,} of {seen:,} samples had no usable image, more than "
                f"{self.LIMIT:.0%}: {_most_common(self.counts(ranks))}; see {self.path}; "
                "python -m data.prepare.check on the folder names all")


class BadSteps:
    """Names the samples of steps without a finite gradient; stops a run after five in a row.

    Such a step leaves the weights as they were (pretrain.py). What add() takes stays on the
    device until check() asks, at log steps: the loop need not wait. grad_norm is that of the
    gradient averaged over ranks, so all come to the same conclusion.
    """

    def __init__(self, pairs):
        self.name_of, self.steps, self.in_a_row = pairs.shards.name, [], 0

    def add(self, step, samples, embeddings, grad_norm):
        """Note step (from 0): samples (b,) int64, their embeddings (b, E), grad_norm ()."""
        self.steps.append((step, samples, embeddings.isfinite().all(1), grad_norm))

    def check(self, ranks, say):
        """Say which of the noted steps were skipped; ValueError at five in a row."""
        for step, samples, finite, grad_norm in self.steps:
            self.in_a_row = 0 if math.isfinite(grad_norm) else self.in_a_row + 1
            if self.in_a_row:
                spoilt = samples[~finite.cpu()].tolist()
                names = ranks.collect([self.name_of(sample) for sample in spoilt])
                names = ", ".join(sum(names, [])[:8]) or "all embeddings are finite"
                say(f"step {step + 1} skipped, its gradient norm is {float(grad_norm)}: "
                    + names)
            if self.in_a_row == 5:
                raise ValueError(
                    f"no finite gradient in five steps up to {step + 1}; go on from the last "
                    "checkpoint with a lower lr or in float32 (--lr=... --change=lr, or "
                    "--dtype=float32 --change=dtype)")
        self.steps = []


def _most_common(reasons):
    most = Counter(reasons).most_common(5)
    return ", ".join(f"{count:,} x {reason}" for reason, count in most)
