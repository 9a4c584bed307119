"""Two-alternative judgements: which of two images, left or right, looks nearer to a reference.

Reads NIGHTS as published (a folder with data.csv) and any CSV with the columns

    ref,left,right,label[,split][,votes][,id]     label: 0 = left is nearer, 1 = right is nearer

whose paths are relative to the CSV's folder and stay inside it: a file made elsewhere can then name
nothing else of your disk, and the folder can move. Two commands write that CSV from other sources:

    python -m data.triplets things TRIPLETS.csv IMAGES.txt OUT.csv    anchor_idx,positive_idx,...
    python -m data.triplets rdm MATRIX.npy IMAGES.txt OUT.csv         mined from dissimilarities

IMAGES.txt has a path a line, relative to OUT.csv's folder; line 1 is image 0. Without a `split`
column, anchors (the distinct `ref`) are dealt out 80/10/10 to train, val and test, so that no
anchor is in two of them.
"""
import csv
import hashlib
import math
import os
import pathlib
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data import images
from data.order import epoch_order

SPLITS = ("train", "val", "test")
# What a triplet needs -> the column that has it, in the two kinds of file. NIGHTS' votes for left
# and right are complementary, which is checked: a file sorted by one column alone would show.
GENERIC = {"ref": "ref", "left": "left", "right": "right", "label": "label"}
NIGHTS = {"ref": "ref_path", "left": "left_path", "right": "right_path", "label": "right_vote",
          "opposite": "left_vote", "split": "split", "votes": "votes",
          "is_imagenet": "is_imagenet", "id": "id"}


class Triplets:
    """One split of a file of judgements.

    path: NIGHTS folder, or a CSV.  split: "train", "val" or "test".
    min_votes: unanimous judgements a triplet needs (NIGHTS: 6); without a votes column all stay.
    fraction: seeded share of the training triplets; nested, 5 % is contained in 10 %.
    shuffle_votes: permute the labels among the kept training triplets (seeded): the control that
        keeps images and label counts and breaks the judgement. Both leave val and test untouched.

    .paths (n,3) str: ref, left, right   .labels (n,) int64: 1 = right nearer
    .is_imagenet (n,) bool, or None      .fingerprint 16 hex of paths, file sizes and labels
    Raises ValueError or FileNotFoundError with one line naming row and column; rows are counted
    as a spreadsheet does, the header being row 1.
    """

    def __init__(self, path, split, min_votes=6, fraction=1.0, shuffle_votes=False, seed=0):
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}")
        if split != "train" and (fraction != 1 or shuffle_votes):
            raise ValueError(f"fraction and shuffle_votes are for split 'train', not {split!r}")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction}: must be above 0 and at most 1")
        self.file, self.split = csv_file(path), split
        rows = [row for row in read_rows(self.file)
                if row["split"] == split and row["votes"] >= min_votes]
        if not rows:
            raise ValueError(f"{self.file}: no row has split {split!r} and at least {min_votes} "
                             "votes; check the split column, or lower min_votes")
        self._arrange(rows)
        # One order of all rows, of which a fraction takes the beginning: so fractions are nested.
        order = np.random.default_rng([seed, 0]).permutation(len(rows))
        keep = np.sort(order[:max(1, round(fraction * len(rows)))])                      # (n,)
        self.index, self.paths, self.labels = self.index[keep], self.paths[keep], self.labels[keep]
        self.is_imagenet = None if self.is_imagenet is None else self.is_imagenet[keep]
        if shuffle_votes:  # among the kept ones: the same images and as many lefts as without it
            self.labels = np.random.default_rng([seed, 1]).permutation(self.labels)
        # A checkpoint remembers what it was trained on; sizes tell other images, times would not
        # survive a copy.
        sizes = [self.sizes[i] for i in self.index.ravel()]
        self.fingerprint = _hash([self.paths.tolist(), sizes, self.labels.tolist()])

    def __len__(self):
        return len(self.labels)

    def _arrange(self, rows):
        """Arrays of the rows, and the distinct images behind them (a THINGS image serves often)."""
        columns = ("ref", "left", "right")
        self.paths = np.array([[row[c] for c in columns] for row in rows])               # (n,3)
        self.labels = np.array([row["label"] for row in rows], dtype=np.int64)           # (n,)
        imagenet = [row["is_imagenet"] for row in rows]
        self.is_imagenet = None if None in imagenet else np.array(imagenet)              # (n,)
        first = {}  # image -> its first (row number, column), for messages
        for row in rows:
            for column in columns:
                first.setdefault(row[column], f"row {row['number']}, column '{row[column + '_']}'")
        self.files, self.where = list(first), list(first.values())                       # m images
        position = {name: i for i, name in enumerate(first)}
        self.index = np.array([[position[name] for name in row] for row in self.paths])  # (n,3) < m
        self.sizes, times = [], []
        for name, where in first.items():
            if not (self.file.parent / name).is_file():
                raise FileNotFoundError(f"{self.file}, {where}: no file {name!r} in "
                                        f"{self.file.parent}; finish the download or fix the path")
            stat = (self.file.parent / name).stat()
            self.sizes.append(stat.st_size)
            times.append(stat.st_mtime_ns)
        # Times too: decoding once more is cheap beside training on pixels of yesterday's images.
        self.kept, self.kept_key = None, _hash([self.files, self.sizes, times])

    def load(self, size, rows=None):
        """Images of the given rows (default all): (n,3,3,S,S) uint8 [triplet, ref/left/right, C].

        Both sides are squashed to S = size, bicubic. Decodes in threads, or gathers from keep().
        """
        index = self.index if rows is None else self.index[np.asarray(rows)]             # (n,3)
        if self.kept is not None and self.kept.shape[-1] == size:
            return torch.from_numpy(self.kept[index])                        # (n,3,3,S,S)
        distinct, place = np.unique(index, return_inverse=True)  # decode a repeated image once
        pixels = np.empty((len(distinct), 3, size, size), np.uint8)                      # (m,3,S,S)
        self._decode(pixels, distinct)
        return torch.from_numpy(pixels[place.reshape(index.shape)])          # (n,3,3,S,S)

    def batch(self, step, config):
        """Batch `step` of a run: samples (B,3) int64, images (B,3,3,S,S) uint8, labels (B,).

        It depends on config's seed, batch_size and image_size only. samples: 3 * row + 0, 1, 2. The
        last partial batch of an epoch is dropped; the next epoch has its own permutation.
        """
        epoch, place = divmod(step, len(self) // config.batch_size)
        order = epoch_order(config.seed, epoch, len(self)).astype(np.int64)
        rows = order[place * config.batch_size:(place + 1) * config.batch_size]          # (B,)
        samples = torch.from_numpy(3 * rows[:, None] + np.arange(3))
        return samples, self.load(config.image_size, rows), torch.from_numpy(self.labels[rows])

    def keep(self, size):
        """Decode every image of the split once into one mapped file; load() then reads from it.

        NIGHTS at 224: 17,444 triplets x 3 images x 150,528 bytes = 7.9 GB, of which train 6.3. The
        system holds what fits in memory and reads the rest from disk: one way for both cases. The
        file is built under a temporary name; its own name carries a hash of paths, sizes and times,
        so changed images are decoded anew, and arms that differ in fraction or votes share it.
        The file lies in index/ beside the CSV and can be deleted at any time.
        """
        target = self.file.parent / "index" / f"images_{size}_{self.kept_key}.npy"
        if not target.exists():
            self._build(target, (len(self.files), 3, size, size))
        self.kept = np.load(target, mmap_mode="r")                                       # (m,3,S,S)

    def _build(self, target, shape):
        """Decode all images of the split into `target`, whole or not at all."""
        need, partial = math.prod(shape), target.with_name(f"{target.name}.{os.getpid()}.tmp")
        print(f"decoding {shape[0]:,} images once into {target} ({need / 1e9:.2f} GB)", flush=True)
        try:
            try:
                target.parent.mkdir(exist_ok=True)
                free = shutil.disk_usage(target.parent).free
                if free < need:  # a mapped file would only find out by a fatal signal
                    raise OSError(f"{free / 1e9:.2f} GB are free, {need / 1e9:.2f} are needed")
                pixels = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
            except OSError as error:
                raise ValueError(f"{target.parent}: decoded images cannot be kept there ({error}); "
                                 "make room, or link its entries into your own folder") from None
            self._decode(pixels, range(shape[0]))
            pixels.flush()
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def _decode(self, out, which):
        """Fill out (len(which),3,S,S) uint8; Pillow frees the lock: 2 threads are 1.9x as fast."""
        def one(slot, i):
            path = self.file.parent / self.files[i]
            try:
                picture = images.decode(path.read_bytes())
            except images.BadImage as error:
                where = f"{self.file}, {self.where[i]}: {self.files[i]}"
                raise ValueError(f"{where}: {error}") from None
            out[slot] = images.squash_image(picture, out.shape[-1]).numpy()
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # list() raises the first error found
            list(pool.map(one, range(len(which)), which))


def _hash(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------ the csv file


def csv_file(path):
    """The CSV itself: `path`, or data.csv in it where it is a folder (NIGHTS)."""
    path = pathlib.Path(path)
    file = path / "data.csv" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give a NIGHTS folder (with data.csv) or a "
                                "CSV with the columns ref,left,right,label")
    return file


def read_rows(file):
    """Every judgement of a CSV as a dict: number, ref, left, right, label, split, votes, ...

    A million rows take 7 s and 0.7 GB, on one core.
    """
    table = _table(file)
    names = _columns(file, next(table))
    rows, seen = [], {}
    for number, cells in table:
        try:
            rows.append(_judgement({key: cells[name] for key, name in names.items()}, names, seen,
                                   number))
        except ValueError as error:
            raise ValueError(f"{file}, row {number}, {error}") from None
    if "split" not in names:
        for row, split in zip(rows, split_anchors([row["ref"] for row in rows], seed=0)):
            row["split"] = split
    return rows


def _table(file):
    """Yields the header, then (row number, {column: cell}) of every line that is not blank."""
    try:
        with open(_file(file), newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines)
            header = next(reader, [])
            yield header
            for number, cells in enumerate(reader, 2):
                if cells and len(cells) != len(header):
                    place = min(len(cells), len(header)) + 1
                    raise ValueError(f"{file}, row {number}, column {place}: {len(cells)} cells "
                                     f"where the header has {len(header)}")
                if cells:
                    yield number, dict(zip(header, cells))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: not a readable CSV in UTF-8: {error}") from None


def _columns(file, header):
    """Which column holds what: NIGHTS' names, or the generic ones with their optional three."""
    names = NIGHTS if "ref_path" in header else GENERIC | {
        key: key for key in ("split", "votes", "id") if key in header}
    _need(file, header, names.values())
    return names


def _need(file, header, columns):
    for name in columns:
        if header.count(name) != 1:
            raise ValueError(f"{file}, row 1, column '{name}': found {header.count(name)} times, "
                             f"needed once; the columns are {', '.join(header) or 'none'}")


def _judgement(cells, names, seen, number):
    """Checked values of a row; `cells` and `names` are keyed alike, `seen` is id -> row number."""
    row = {"number": number, "split": None, "votes": np.inf, "is_imagenet": None}
    for key in ("ref", "left", "right"):
        row[key], row[key + "_"] = _inside(cells[key], names[key]), names[key]
    row["label"] = _number(cells["label"], names["label"], (0, 1))
    if "opposite" in cells:
        _number(cells["opposite"], names["opposite"], (1 - row["label"],))
    if "votes" in cells:
        row["votes"] = _number(cells["votes"], names["votes"])
    if "split" in cells:
        row["split"] = cells["split"].strip()
        if row["split"] not in SPLITS:
            raise ValueError(f"column 'split': {row['split']!r} is none of {', '.join(SPLITS)}")
    if "is_imagenet" in cells:
        word = cells["is_imagenet"].strip().lower()
        if word not in ("true", "false", "1", "0"):
            raise ValueError(f"column 'is_imagenet': {word!r} is neither True nor False")
        row["is_imagenet"] = word in ("true", "1")
    if "id" in cells and seen.setdefault(cells["id"], number) != number:
        raise ValueError(f"column 'id': {cells['id']!r} is already in row {seen[cells['id']]}")
    return row


def _number(text, column, allowed=None):
    """A whole number, one of `allowed` if given; pandas may have written 1 as 1.0."""
    try:
        value = float(text)
        whole = value == int(value)
    except (ValueError, OverflowError):
        whole = False
    if not whole or allowed and value not in allowed:
        wanted = "a whole number" if allowed is None else " or ".join(map(str, allowed))
        raise ValueError(f"column '{column}': {text!r} must be {wanted}")
    return int(value)


def _inside(text, column):
    """A relative path that does not climb out of the CSV's folder."""
    if not text.strip() or "\0" in text or text[0] == "/" or ".." in text.split("/"):
        raise ValueError(f"column '{column}': {text!r} must be a path relative to the CSV's "
                         "folder, and inside it")
    return sys.intern(text)  # one THINGS image is named in thousands of rows


def split_anchors(anchors, seed):
    """train, val or test for each triplet, by its anchor alone: 80/10/10 of the anchors."""
    distinct = sorted(set(anchors))  # a set's own order changes from process to process
    order = np.random.default_rng(seed).permutation(len(distinct))
    tenth = max(1, len(distinct) // 10)
    names = ["val"] * tenth + ["test"] * tenth + ["train"] * len(distinct)
    split = {distinct[i]: name for i, name in zip(order, names)}
    return [split[anchor] for anchor in anchors]


# ------------------------------------------------------------------------- conversions to that csv


def _file(path):
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return pathlib.Path(path)
