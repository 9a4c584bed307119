"""Evaluation sets: the table of rows (benchmarks.csv), and one set as it lies on disk.

A set is a folder wds_<name>_test, or wds_<name>, as huggingface.co/djghosh and /clip-benchmark
have them and `data.prepare.tars.write_set` writes them, of classnames.txt (line number =
label), zeroshot_classification_templates.txt (one prompt a line, {c} stands for the name),
test/nshards.txt, test/0.tar, 1.tar ... and, optional, dataset_type.txt (classification,
retrieval or multilabel) and family.txt (the family it is averaged in).

An evaluation is never quietly smaller: whatever is missing or unreadable is an error that names
it. Letters: n samples, C classes, m captions.
"""
import csv
import hashlib
import io
import os
import typing
from pathlib import Path

import numpy as np

from data.images import DECODER_ERRORS, decode, open_image


class Row(typing.NamedTuple):
    """One benchmark of the paper: where it lives, what size it must have, what is published."""
    title: str
    family: str
    sets: tuple      # its names: in djghosh's home, then in clip-benchmark's if that differs
    n: int           # test images as published; 0: in neither home
    classes: int     # 0: retrieval
    main: str        # the metric that stands for the row in family means
    published: tuple  # OpenAI ViT-B/32, %: acc1, acc5; to image @1 @5 and to text @1 @5
    lists: tuple = ()  # which of the two lists of LISTS have it


def read_rows():
    """The rows of benchmarks.csv: names are separated by spaces, figures by slashes."""
    rows = []
    with open(Path(__file__).with_suffix(".csv"), newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            figures = line["published"].split("/")
            published = tuple(None if text == "-" else float(text) for text in figures)
            rows.append(Row(line["title"], line["family"], tuple(line["sets"].split()),
                            int(line["n"]), int(line["classes"]), line["main"], published,
                            tuple(line["lists"].split())))
    return rows


_TABLE = read_rows()
ROWS = tuple(row for row in _TABLE if row.n > 0)  # all but Birdsnap, which neither home has
# This paper has two lists of 29: its group's script ran "code", a later plan names "plan".
LISTS = {name: tuple(row for row in _TABLE if name in row.lists) for name in ("code", "plan")}
ROW_OF = {name: row for row in _TABLE for name in row.sets}


def find_sets(folder):
    """{set name: folder} of every set in `folder`, in the order of the folders' names.

    FileNotFoundError where there is none, ValueError where two folders are the same set.
    """
    found = {}
    for path in sorted(Path(folder).glob("wds_?*/")):
        name = set_name(path)
        if name in found:  # the two homes differ in prompts (SVHN), so no silent choice
            raise ValueError(f"{found[name]} and {path} are the same set; move one away")
        found[name] = path
    if not found:
        raise FileNotFoundError(f"benchmarks={folder}: no such folder, or no set in it; "
                                "data.prepare.toy and data.prepare.benchmarks make some")
    return found


def open_sets(folder, partial):
    """{set name: BenchmarkSet} of a folder; ValueError for a row of another size than published.

    partial: take those as well.
    """
    sets = {}
    for name, place in find_sets(folder).items():
        sets[name] = BenchmarkSet(place)
        difference = unlike_row(sets[name])
        if difference and not partial:
            raise ValueError(f"{difference}; complete it, or accept it by --partial=true")
    return sets


def set_name(folder):
    """wds_<name>_test or wds_<name> -> <name>; of a row its first, from whichever home."""
    name = Path(folder).name.removeprefix("wds_").removesuffix("_test")
    return ROW_OF[name].sets[0] if name in ROW_OF else name


def unlike_row(benchmark):
    """How a BenchmarkSet differs from the row of its name, as a sentence; "" if it does not."""
    row, n, classes = benchmark.row, len(benchmark), len(benchmark.classnames)
    if row not in ROWS or (n, classes) == (row.n, row.classes):
        return ""
    return (f"{benchmark.folder}: {n:,} images in {classes:,} classes, but {row.title} has "
            f"{row.n:,} in {row.classes:,}")


# type: the kind of its label files, and the main metric of sets that have no row
TYPES = {"classification": ("cls", "acc1"), "multilabel": ("npy", "mean_average_precision"),
         "retrieval": ("txt", "mean_recall@1")}


class BenchmarkSet:
    """One set, indexed by a pass over its shards; images are read when they are asked for.

    classnames, templates: lists of str (empty for retrieval).  labels: (n,) int64, (n,C) for
    multilabel, (m,) image index of each caption for retrieval.  captions: list of m str.
    fingerprints: sha256 of the class names, the templates, the samples (names, sizes, labels).
    Raises OSError or ValueError that names the file, or the shard and member.
    """

    def __init__(self, folder):
        self.folder, self.name = Path(folder), set_name(folder)
        self.row = ROW_OF.get(self.name)
        self.type = self._lines("dataset_type.txt", "classification")[0].lower()
        if self.type not in TYPES:
            raise ValueError(f"{folder}/dataset_type.txt: {self.type!r} is none of "
                             f"{', '.join(TYPES)}")
        self.family = self.row.family if self.row else self._lines("family.txt", "other")[0]
        self.classnames, self.templates = [], []
        if self.type != "retrieval":
            self.classnames = self._lines("classnames.txt")  # an empty line is a class as well
            self.templates = self._lines("zeroshot_classification_templates.txt")
        for number, template in enumerate(self.templates, 1):
            if "{c}" not in template:
                raise ValueError(f"{folder}/zeroshot_classification_templates.txt:{number}: "
                                 f"{template!r} has no {{c}} for the class name")
        self._index()

    def __len__(self):
        return len(self._places)

    def image(self, i):
        """Image i as Pillow RGB: a row's as published, of other sets as training reads it."""
        path, name, offset, size = self._places[i]
        with open(path, "rb") as file:
            content = os.pread(file.fileno(), size, offset)
        try:
            return open_image(content).convert("RGB") if self.row else decode(content)
        except DECODER_ERRORS as error:
            raise ValueError(f"{path}: {name}: undecodable image ({error})") from None

    def prompts(self):
        """C*T prompts, class after class; str.replace, because names may hold braces."""
        return [template.replace("{c}", name)
                for name in self.classnames for template in self.templates]

    def about(self):
        """What a result file says of the set."""
        return {"main": self.row.main if self.row else TYPES[self.type][1],
                "family": self.family, "type": self.type,
                "n": len(self), "classes": len(self.classnames),
                "templates": len(self.templates), "captions": len(self.captions),
                "partial": bool(unlike_row(self)),
                "pixels": "as published", **self.fingerprints}

    def _lines(self, name, default=None):
        path = self.folder / name
        if default and not path.exists():
            return [default]
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: is not UTF-8 text") from None
        return [line.strip() for line in lines or [""]]

    def _index(self):
        """Note labels, where images lie, and fingerprints, shard by shard."""
        test, count = self.folder / "test", self._lines("test/nshards.txt")[0]
        if not count.isdecimal():
            raise ValueError(f"{test}/nshards.txt: {count!r} is not a number of shards")
        shards = [test / f"{number}.tar" for number in range(int(count))]
        for path in set(test.glob("*.tar")) - set(shards):
            raise ValueError(f"{path}: one too many, nshards.txt says {count} shards")
        self._places, self.captions, labels = [], [], []
        samples = hashlib.sha256()
        for path in shards:
            for (name, offset, size), label, content in read_samples(path, TYPES[self.type][0]):
                try:
                    labels += self._labels(content)
                except ValueError as error:
                    raise ValueError(f"{path}: {label}: {error}") from None
                self._places.append((path, name, offset, size))
                samples.update(f"{name} {size} ".encode() + content)
        if not self._places:
            raise ValueError(f"{self.folder}: its shards hold no samples")
        self.labels = np.array(labels, dtype=np.int64)
        self.fingerprints = {"samples_sha256": samples.hexdigest()}
        if not self.row:  # a result from before they were turned upright is of other pixels
            self.fingerprints["pixels"] = "upright"
        for what, lines in (("classnames", self.classnames), ("templates", self.templates)):
            digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
            self.fingerprints[f"{what}_sha256"] = digest

    def _labels(self, content):
        """The bytes of the next image's label -> its elements of .labels; notes captions."""
        classes = len(self.classnames)
        if self.type == "retrieval":
            captions = content.decode().splitlines()  # UnicodeDecodeError is a ValueError
            if not captions:
                raise ValueError("no caption")
            self.captions += captions
            return [len(self._places)] * len(captions)
        if self.type == "multilabel":
            vector = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
            if vector.shape != (classes,) or not np.isin(vector, (0, 1)).all():
                raise ValueError(f"must be {classes} values of 0 or 1, one a class name")
            return [vector]
        text = " ".join(content.decode("ascii").split())
        if not text.isdecimal() or int(text) >= classes:
            raise ValueError(f"label {text[:40]}, but classnames.txt has {classes} lines "
                             f"(labels 0 to {classes - 1})")
        return [int(text)]


def read_samples(path, label_kind):
    """Yield (image, label's name, label's bytes) of each sample of a shard, in its order.

    image: (name, offset, size). A sample's key is webdataset's: the path up to the first dot.
    """
    from data.prepare.index import IMAGE_KINDS, read_members, split_name  # an edge
    members, last = read_members(path)
    if last is not None:
        raise ValueError(f"{path}: broken shard, cut or damaged after "
                         f"{last.decode(errors='replace') or 'its beginning'}; fetch it again")
    samples = {}
    for member, offset, size in members:
        key, kind = split_name(member)
        name = f"{os.path.basename(key).decode(errors='replace')}.{kind}"
        parts = samples.setdefault(key, {})
        if kind in parts:
            raise ValueError(f"{path}: {name} is there twice")
        parts[kind] = (name, offset, size)
    with open(path, "rb") as file:
        for key, parts in samples.items():
            images = [parts[kind] for kind in IMAGE_KINDS if kind in parts]
            if len(images) != 1 or label_kind not in parts:
                raise ValueError(f"{path}: {key.decode(errors='replace')} has "
                                 f"{', '.join(parts)}; needs {label_kind} and one of "
                                 f"{', '.join(IMAGE_KINDS)}")
            name, offset, size = parts[label_kind]
            yield images[0], name, os.pread(file.fileno(), size, offset)
