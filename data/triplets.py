"""Two-alternative judgements: which of two images, left or right, looks nearer to a reference.

Reads NIGHTS as published (a folder with data.csv) and any CSV with the columns

    ref,left,right,label[,split][,votes][,id]     label: 0 = left is nearer, 1 = right

Paths are relative to the CSV's folder and stay inside it: the folder can move, and a file made
elsewhere names nothing else of your disk. Without a `split` column the anchors (the distinct
`ref`) are dealt 80/10/10 to train, val and test. data/prepare/triplets.py writes such files.
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
from data.log import cache_folder, index_folder
from data.order import epoch_order

SPLITS = ("train", "val", "test")
SIDES = ("ref", "left", "right")
# What a triplet needs -> the column that holds it, in the two kinds of file. NIGHTS' votes for
# left and right are complementary; a file sorted by one of the two columns alone would show.
GENERIC = {"ref": "ref", "left": "left", "right": "right", "label": "label"}
NIGHTS = {"ref": "ref_path", "left": "left_path", "right": "right_path", "label": "right_vote",
          "opposite": "left_vote", "split": "split", "votes": "votes",
          "is_imagenet": "is_imagenet", "id": "id"}


class Triplets:
    """One split of a file of judgements.

    path: NIGHTS folder, or a CSV.  split: "train", "val" or "test".
    min_votes: unanimous judgements a triplet needs (NIGHTS: 6); all stay without such a column.
    fraction: share of the training triplets, seeded and nested: 5 % is contained in 10 %.
    shuffle_votes: permute the labels among the kept training triplets, seeded: the control that
        keeps images and label counts and breaks the judgement.

    .paths (n,3) str: ref, left, right   .labels (n,) int64: 1 = right nearer
    .files: the m distinct images        .index (n,3): their numbers
    .is_imagenet (n,) bool, or None      .fingerprint 16 hex of paths, file sizes and labels
    Raises ValueError or FileNotFoundError with one line naming row and column; rows are counted
    as a spreadsheet does, the header being row 1.
    """

    type = "2afc"  # beside the types of a BenchmarkSet

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
            raise ValueError(f"{self.file}: no row has split {split!r} and at least "
                             f"{min_votes} votes; check the split column, or lower min_votes")
        self._find_images(rows)
        # A fraction takes the beginning of one order of all rows: so fractions are nested.
        order = np.random.default_rng([seed, 0]).permutation(len(rows))
        chosen = np.sort(order[:max(1, round(fraction * len(rows)))])                    # (n,)
        rows = [rows[i] for i in chosen]
        number = {name: i for i, name in enumerate(self.files)}
        self.paths = np.array([[row[side] for side in SIDES] for row in rows])           # (n,3)
        self.index = np.array([[number[name] for name in row] for row in self.paths])    # (n,3)
        self.labels = np.array([row["label"] for row in rows], np.int64)                 # (n,)
        self.is_imagenet = None
        if rows[0]["is_imagenet"] is not None:
            self.is_imagenet = np.array([row["is_imagenet"] for row in rows])            # (n,)
        if shuffle_votes:  # among the chosen: the same images and as many lefts as without it
            self.labels = np.random.default_rng([seed, 1]).permutation(self.labels)
        # Sizes tell other images; times would not survive a copy.
        sizes = [self.sizes[i] for i in self.index.ravel()]
        self.fingerprint = fingerprint([self.paths.tolist(), sizes, self.labels.tolist()])
        self.fingerprints = {"samples_sha256": self.fingerprint}  # as BenchmarkSet has them

    def __len__(self):
        return len(self.labels)

    def _find_images(self, rows):
        """The m distinct images of all rows: names, first places, sizes in bytes."""
        self.where = {}
        for row in rows:
            for side in SIDES:
                where = f"row {row['number']}, column '{row['columns'][side]}'"
                self.where.setdefault(row[side], where)
        self.files = list(self.where)
        self.sizes, times = [], []
        for name in self.files:
            path = self.file.parent / name
            if not path.is_file():
                raise FileNotFoundError(
                    f"{self.file}, {self.where[name]}: no file {name!r} in {self.file.parent}; "
                    "finish the download or fix the path")
            self.sizes.append(path.stat().st_size)
            times.append(path.stat().st_mtime_ns)
        # Times too: decoding again is cheap beside training on yesterday's pixels.
        self.kept_key = fingerprint([self.files, self.sizes, times])
        self.kept = None  # after keep(): (m,3,S,S) uint8

    def load(self, size, rows=None):
        """Images of the given rows (default all): (n,3,3,S,S) uint8, [triplet, side, channel].

        Height and width are squashed to S = size, bicubic; decoded now, or read from keep()'s.
        """
        index = self.index if rows is None else self.index[np.asarray(rows)]             # (n,3)
        distinct, place = np.unique(index, return_inverse=True)  # each image is read once
        return self.images(size, distinct)[place.reshape(index.shape)]       # (n,3,3,S,S)

    def images(self, size, numbers):
        """The images of these numbers of .files: (m,3,S,S) uint8, as `load` has them."""
        if self.kept is not None and self.kept.shape[-1] == size:
            return torch.from_numpy(self.kept[numbers])
        pixels = np.empty((len(numbers), 3, size, size), np.uint8)
        self._decode(numbers, pixels)
        return torch.from_numpy(pixels)

    def pixels(self, size):
        """All of the m distinct images, as items of evaluate.embed."""
        return TripletPixels(self, size)

    def batch(self, step, config):
        """Batch `step` of a run: samples (B,3) int64, images (B,3,3,S,S) uint8, labels (B,).

        It depends on config's seed, batch_size and image_size only. samples: 3 * row + 0, 1, 2.
        The last partial batch of an epoch is dropped; each epoch has its own permutation.
        """
        epoch, place = divmod(step, len(self) // config.batch_size)
        order = epoch_order(config.seed, epoch, len(self)).astype(np.int64)
        rows = order[place * config.batch_size:(place + 1) * config.batch_size]          # (B,)
        samples = torch.from_numpy(3 * rows[:, None] + np.arange(3))                     # (B,3)
        return samples, self.load(config.image_size, rows), torch.from_numpy(self.labels[rows])

    def keep(self, size):
        """Decode every image of the split once into a mapped file, which load() then reads.

        NIGHTS at 224: 17,444 triplets x 3 images x 150,528 bytes = 7.9 GB, of which train 6.3.
        The system holds in memory what fits. The file, in `index_folder`, can be deleted.
        Its name carries a hash of paths, sizes and times: changed images are decoded anew, and
        arms that differ in fraction or votes share it.
        """
        name = f"images_{size}_{self.kept_key}.npy"
        target = self.file.parent / "index" / name
        if not target.exists():
            target = cache_folder(self.file.parent) / name
        if not target.exists():
            target = index_folder(self.file.parent) / name
        if not target.exists():
            self._write_kept(target, (len(self.files), 3, size, size))
        self.kept = np.load(target, mmap_mode="r")                           # (m,3,S,S)

    def _write_kept(self, target, shape):
        """Decode all images into `target`, whole or not at all."""
        need, free = math.prod(shape), shutil.disk_usage(target.parent).free
        if free < need:  # writing to a mapped file on a full disk would end in a fatal signal
            raise ValueError(f"{target.parent}: decoded images need {need / 1e9:.2f} GB, "
                             f"{free / 1e9:.2f} GB are free; make room")
        print(f"decoding {shape[0]:,} images once into {target}: {need / 1e9:.2f} GB",
              flush=True)
        unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            pixels = np.lib.format.open_memmap(unfinished, "w+", np.uint8, shape)
            self._decode(range(shape[0]), pixels)
            pixels.flush()
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)

    def _decode(self, numbers, pixels):
        """Fill pixels (m,3,S,S) uint8 with m images; 2 threads are 1.9 times as fast as one."""
        def decode_one(slot, number):
            name = self.files[number]
            try:
                picture = images.decode((self.file.parent / name).read_bytes())
            except images.BadImage as error:
                raise ValueError(f"{self.file}, {self.where[name]}: {name}: {error}") from None
            pixels[slot] = images.squash_image(picture, pixels.shape[-1]).numpy()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(decode_one, range(len(numbers)), numbers))  # raises the first error


class TripletPixels(images.Pixels):
    """The distinct images of Triplets, squashed."""

    def __len__(self):
        return len(self.pictures.files)

    def __getitems__(self, numbers):
        return self.pictures.images(self.size, numbers)


def fingerprint(value):
    """16 hex digits that tell apart plain lists, numbers and strings."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------- the csv file


def csv_file(path):
    """The CSV itself: `path`, or data.csv in it where it is a folder (NIGHTS)."""
    path = pathlib.Path(path)
    file = path / "data.csv" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give a NIGHTS folder (with data.csv) "
                                "or a CSV with the columns ref,left,right,label")
    return file


def read_rows(file):
    """Every judgement of a CSV as a dict: number, ref, left, right, label, split, votes, ...

    A million rows take 7 s and 0.7 GB, on one core.
    """
    table = read_table(file)
    header = next(table)
    columns = GENERIC.copy()
    for name in ("split", "votes", "id"):
        if name in header:
            columns[name] = name
    if "ref_path" in header:
        columns = NIGHTS
    need_columns(file, header, columns.values())
    rows, number_of = [], {}
    for number, cells in table:
        try:
            row = read_row(cells, columns)
        except ValueError as error:
            raise ValueError(f"{file}, row {number}, {error}") from None
        row["number"] = number
        rows.append(row)
        if "id" in columns and number_of.setdefault(cells["id"], number) != number:
            raise ValueError(f"{file}, row {number}, column 'id': {cells['id']!r} is already "
                             f"in row {number_of[cells['id']]}")
    if "split" not in columns:
        splits = deal_splits([row["ref"] for row in rows], seed=0)
        for row in rows:
            row["split"] = splits[row["ref"]]
    return rows


def read_row(cells, columns):
    """Checked values of one row. Errors name the column; the caller adds file and row."""
    row = {"columns": columns, "split": None, "votes": math.inf, "is_imagenet": None}
    for side in SIDES:
        row[side] = inside_path(cells, columns[side])
    row["label"] = whole_number(cells, columns["label"], allowed=(0, 1))
    if "opposite" in columns:
        whole_number(cells, columns["opposite"], allowed=(1 - row["label"],))
    if "votes" in columns:
        row["votes"] = whole_number(cells, columns["votes"])
    if "split" in columns:
        row["split"] = cells["split"].strip()
        if row["split"] not in SPLITS:
            raise ValueError(f"column 'split': {row['split']!r} is none of {', '.join(SPLITS)}")
    if "is_imagenet" in columns:
        word = cells["is_imagenet"].strip().lower()
        if word not in ("true", "false", "1", "0"):
            raise ValueError(f"column 'is_imagenet': {word!r} is neither True nor False")
        row["is_imagenet"] = word in ("true", "1")
    return row


def read_table(file):
    """Yields the header, then (row number, {column: cell}) of every line that is not blank."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines)
            header = next(reader, [])
            yield header
            for number, cells in enumerate(reader, 2):
                if cells and len(cells) != len(header):
                    column = min(len(cells), len(header)) + 1
                    raise ValueError(f"{file}, row {number}, column {column}: {len(cells)} "
                                     f"cells where the header has {len(header)}")
                if cells:
                    yield number, dict(zip(header, cells))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: not a readable CSV in UTF-8: {error}") from None


def need_columns(file, header, columns):
    """ValueError unless the header has each of `columns` once."""
    for name in columns:
        count = header.count(name)
        if count != 1:
            raise ValueError(f"{file}, row 1, column '{name}': found {count} times, needed "
                             f"once; the columns are {', '.join(header) or 'none'}")


def whole_number(cells, column, allowed=None):
    """The number in a cell, one of `allowed` if given; pandas may have written 1 as 1.0."""
    try:
        value = float(cells[column])
    except ValueError:
        value = math.nan
    if not value.is_integer() or allowed and value not in allowed:
        wanted = " or ".join(map(str, allowed)) if allowed else "a whole number"
        raise ValueError(f"column '{column}': {cells[column]!r} must be {wanted}")
    return int(value)


def inside_path(cells, column):
    """The relative path in a cell, which must not climb out of the CSV's folder."""
    text = cells[column]
    if not text.strip() or "\0" in text or text[0] == "/" or ".." in text.split("/"):
        raise ValueError(f"column '{column}': {text!r} must be a path relative to the CSV's "
                         "folder, and inside it")
    return sys.intern(text)  # one THINGS image is named in thousands of rows


def deal_splits(names, seed):
    """{name: "train", "val" or "test"}: 80/10/10 of the distinct names."""
    distinct = sorted(set(names))  # a set's own order changes from process to process
    order = np.random.default_rng(seed).permutation(len(distinct))
    tenth = max(1, len(distinct) // 10)
    names = ["val"] * tenth + ["test"] * tenth + ["train"] * len(distinct)
    return {distinct[number]: split for number, split in zip(order, names)}
