"""Evaluation sets: the table of rows (benchmarks.csv), and one set as it lies on disk.

A set is a folder wds_<name>_test, or wds_<name>, with

    classnames.txt                           line number = label
    zeroshot_classification_templates.txt    one prompt a line, {c} stands for the name
    dataset_type.txt                         optional: classification, retrieval or multilabel
    family.txt                               optional: the family it is averaged in
    test/nshards.txt, test/0.tar, 1.tar ...  the samples

The two public homes, huggingface.co/djghosh and huggingface.co/clip-benchmark, have this
layout, and `data.prepare.tars.write_set` writes it. An evaluation is never quietly smaller:
whatever is missing or unreadable is an error that names it. Letters: n samples, C classes, m
captions.
"""
import csv
import hashlib
import io
import itertools
import os
import re
import tarfile
import typing
from pathlib import Path

import numpy as np

from data.images import DECODER_ERRORS, BadImage, open_image

# -------------------------------------------------------------------------- the table of rows


class Row(typing.NamedTuple):
    """One benchmark of the paper: where it lives, what size it must have, what is published."""
    title: str
    family: str
    sets: tuple      # its names: in djghosh's home, then in clip-benchmark's if that differs
    n: int           # test images as published; 0: in neither home
    classes: int     # 0: retrieval
    main: str        # the metric that stands for the row in family means
    templates: int   # clip-benchmark has 6 for SVHN, and its published figures are with those
    published: tuple  # OpenAI ViT-B/32, %: acc1, acc5; to image @1 @5 and to text @1 @5
    lists: tuple = ()  # which of the two lists of LISTS have it


def read_rows(path):
    """The Rows of a CSV file; several names are separated by spaces, figures by slashes."""
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            figures = line["published"].split("/")
            published = tuple(None if text == "-" else float(text) for text in figures)
            rows.append(Row(line["title"], line["family"], tuple(line["sets"].split()),
                            int(line["n"]), int(line["classes"]), line["main"],
                            int(line["templates"]), published, tuple(line["lists"].split())))
    return tuple(rows)


_TABLE = read_rows(Path(__file__).with_suffix(".csv"))
ROWS = tuple(row for row in _TABLE if row.n > 0)  # all but Birdsnap, which neither home has
# This paper has two lists of 29: its group's script ran "code", a later plan names "plan".
LISTS = {name: tuple(row for row in _TABLE if name in row.lists) for name in ("code", "plan")}
ROW_OF = {name: row for row in _TABLE for name in row.sets}
MAIN = {"classification": "acc1", "multilabel": "mean_average_precision",
        "retrieval": "mean_recall@1"}  # the main metric of sets that have no row


def set_name(folder):
    """wds_<name>_test or wds_<name> -> <name>; None if the folder's name has neither form."""
    match = re.fullmatch(r"wds_(.+?)(_test)?", os.path.basename(os.path.normpath(folder)))
    return match[1] if match else None


def find_sets(folder):
    """{set name: folder} of every set in `folder`, in the order of the folders' names.

    A row's set goes by its first name whichever home it came from. Raises FileNotFoundError for
    a missing or empty folder and ValueError where two folders are the same set.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"benchmarks={folder}: no such folder; data.prepare.toy draws "
                                "one, data.prepare.benchmarks fetches the real sets")
    found = {}
    for entry in sorted(os.listdir(folder)):
        path, name = os.path.join(folder, entry), set_name(entry)
        if name is None or not os.path.isdir(path):
            continue
        if name in ROW_OF:
            name = ROW_OF[name].sets[0]
        if name in found:  # the two homes differ in prompts (SVHN), so no silent choice
            raise ValueError(f"{folder}: {os.path.basename(found[name])} and {entry} are the "
                             "same set; move one of them away")
        found[name] = path
    if not found:
        raise FileNotFoundError(f"benchmarks={folder}: holds no folder wds_<name>_test")
    return found


def unlike_row(benchmark):
    """How a BenchmarkSet differs from the row of its name, as a sentence; "" if it does not."""
    row = ROW_OF.get(benchmark.name)
    n, classes = len(benchmark), len(benchmark.classnames)
    if row not in ROWS or (n, classes) == (row.n, row.classes):
        return ""
    return (f"{benchmark.folder}: {n:,} images in {classes:,} classes, but {row.title} has "
            f"{row.n:,} in {row.classes:,}")


# -------------------------------------------------------------------------- one set on disk

_IMAGE_TYPES = ("webp", "png", "jpg", "jpeg")
_LABEL_TYPE = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}


class BenchmarkSet:
    """One set, indexed by a pass over its shards; images are read when they are asked for.

    classnames, templates: lists of str (empty for retrieval).  labels: (n,) int64, (n,C) for
    multilabel, (m,) image index of each caption for retrieval.  captions: list of m str.
    fingerprints: sha256 of the class names, the templates, the samples (names, sizes, labels).
    Raises FileNotFoundError or ValueError that names the file, or the shard and member.
    """

    def __init__(self, folder):
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder}: no such benchmark set")
        self.folder = folder
        self.name = set_name(folder) or os.path.basename(folder)
        self.type = self._text("dataset_type.txt", "classification").strip().lower()
        if self.type not in _LABEL_TYPE:
            raise ValueError(f"{folder}/dataset_type.txt: {self.type!r} is none of "
                             f"{', '.join(_LABEL_TYPE)}")
        self.family = self._text("family.txt", "other").strip()
        self.classnames, self.templates = [], []
        if self.type != "retrieval":
            self.classnames = self._lines("classnames.txt")  # an empty line is a class as well
            self.templates = self._lines("zeroshot_classification_templates.txt")
        for number, template in enumerate(self.templates, 1):
            if "{c}" not in template:
                raise ValueError(f"{folder}/zeroshot_classification_templates.txt:{number}: "
                                 f"{template!r} has no {{c}} for the class name")
        samples_sha256 = self._index()
        self.fingerprints = {"classnames_sha256": _sha256(self.classnames),
                             "templates_sha256": _sha256(self.templates),
                             "samples_sha256": samples_sha256}

    def __len__(self):
        return len(self._places)

    def image(self, i):
        """Image i as Pillow RGB. Plain convert("RGB"), as the published figures were made."""
        path, place = self._places[i]
        with open(path, "rb") as file:
            file.seek(place.offset)
            content = file.read(place.size)
        try:
            return open_image(content).convert("RGB")
        except (BadImage, *DECODER_ERRORS) as error:
            raise ValueError(f"{path}: {place.name}: undecodable image ({error})") from None

    def prompts(self):
        """C*T prompts, class after class; str.replace, because names may hold braces."""
        return [template.replace("{c}", name)
                for name in self.classnames for template in self.templates]

    def about(self):
        """What a result file says of the set."""
        row = ROW_OF.get(self.name)
        return {"main": row.main if row else MAIN[self.type],
                "family": row.family if row else self.family, "type": self.type,
                "n": len(self), "classes": len(self.classnames),
                "templates": len(self.templates), "captions": len(self.captions),
                "partial": bool(unlike_row(self)), **self.fingerprints}

    def _index(self):
        """Note labels, and where images lie; the sha256 of names, sizes and labels."""
        self._places, self.captions, labels = [], [], []
        digest = hashlib.sha256()
        for path in self._shards():
            for key, parts in read_samples(path):
                image, label = self._parts(path, key, parts)
                try:
                    value = self._label(label.content)
                except ValueError as error:
                    raise ValueError(f"{path}: {label.name}: {error}") from None
                if self.type == "retrieval":
                    labels += [len(self._places)] * len(value)
                    self.captions += value
                else:
                    labels.append(value)
                self._places.append((path, image))
                digest.update(f"{image.name} {image.size} ".encode() + label.content)
        if not self._places:
            raise ValueError(f"{self.folder}: its shards hold no samples")
        self.labels = np.array(labels, dtype=np.int64)
        return digest.hexdigest()

    def _parts(self, path, key, parts):
        """The image and the label among a sample's files."""
        images = [parts[extension] for extension in _IMAGE_TYPES if extension in parts]
        if len(images) != 1:
            raise ValueError(f"{path}: {key} has {len(images)} images ({', '.join(parts)}), "
                             f"must have one of {', '.join(_IMAGE_TYPES)}")
        kind = _LABEL_TYPE[self.type]
        if kind not in parts:
            raise ValueError(f"{path}: {key}.{kind} is missing (only {', '.join(parts)})")
        return images[0], parts[kind]

    def _label(self, content):
        """A label's bytes -> int, list of captions, or (C,) array of 0 and 1."""
        classes = len(self.classnames)
        if self.type == "retrieval":
            captions = content.decode().splitlines()  # UnicodeDecodeError is a ValueError
            if not captions:
                raise ValueError("no caption")
            return captions
        if self.type == "multilabel":
            vector = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
            if vector.shape != (classes,) or not np.isin(vector, (0, 1)).all():
                raise ValueError(f"must be {classes} values of 0 or 1, a line of "
                                 "classnames.txt each")
            return vector
        text = content.decode("ascii").strip()
        if not text.isdecimal():
            raise ValueError(f"{text[:40]!r} is not a label")
        if int(text) >= classes:
            raise ValueError(f"label {int(text)}, but classnames.txt has {classes} lines "
                             f"(labels 0 to {classes - 1})")
        return int(text)

    def _shards(self):
        """The shard paths in numeric order, all that nshards.txt promises and no other."""
        test = os.path.join(self.folder, "test")
        count = self._text("test/nshards.txt").strip()
        if not count.isdecimal() or int(count) == 0:
            raise ValueError(f"{test}/nshards.txt: {count!r} is not a number of shards")
        wanted = [f"{number}.tar" for number in range(int(count))]
        present = [name for name in os.listdir(test) if name.endswith(".tar")]
        for name in sorted(set(wanted) ^ set(present)):
            state = "missing" if name in wanted else "one too many"
            raise ValueError(f"{test}/{name}: {state}, nshards.txt says {count} shards")
        return [os.path.join(test, name) for name in wanted]

    def _text(self, name, default=None):
        path = Path(self.folder, name)
        if default is not None and not path.exists():
            return default
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; every set of type {self.type} needs it")
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: is not UTF-8 text") from None

    def _lines(self, name):
        lines = [line.strip() for line in self._text(name).splitlines()]
        if not lines:
            raise ValueError(f"{self.folder}/{name}: is empty")
        return lines


class Part(typing.NamedTuple):
    """A file in a shard: where its bytes lie, and those of a label."""
    name: str
    offset: int
    size: int
    content: bytes | None


def read_samples(path):
    """Yield (key, {extension: Part}) of each sample of a shard, in its order.

    Consecutive files with one key, which is the name up to its first dot, are one sample.
    """
    for key, files in itertools.groupby(read_files(path), lambda file: file.name.split(".")[0]):
        parts = {}
        for file in files:
            extension = file.name.removeprefix(f"{key}.")
            if extension in parts:
                raise ValueError(f"{path}: {file.name} is there twice")
            parts[extension] = file
        yield key, parts


def read_files(path):
    """Yield each file of a shard as a Part; ValueError if the shard is damaged or cut.

    tarfile ends quietly at a damaged or missing header, but a whole archive ends in zeros.
    """
    name = "its beginning"
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="replace") as shard:
            for info in filter(tarfile.TarInfo.isfile, shard):
                key, dot, extension = os.path.basename(info.name).partition(".")
                name, content = key + dot + extension.lower(), None
                if name.endswith(tuple(_LABEL_TYPE.values())):
                    content = shard.extractfile(info).read()
                yield Part(name, info.offset_data, info.size, content)
            shard.fileobj.seek(shard.offset)
            end = shard.fileobj.read()
            if any(end) or len(end) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError
    except (tarfile.TarError, ValueError, OverflowError):  # the latter by damaged numbers
        raise ValueError(f"{path}: broken shard, cut or damaged after {name}; "
                         "fetch it again") from None


def _sha256(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
