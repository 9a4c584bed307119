"""Evaluation sets: the table of rows, a set's layout on disk, and a model's metrics on one set.

A set is a folder wds_<name>_test (or wds_<name>) with classnames.txt (line number = label),
zeroshot_classification_templates.txt (one prompt a line, {c} for the name), optionally
dataset_type.txt ("classification", "retrieval" or "multilabel") and family.txt, and the samples in
test/0.tar ... test/{n-1}.tar with test/nshards.txt. This is the layout of the two public homes,
huggingface.co/djghosh and huggingface.co/clip-benchmark, and `write_set` writes it.

The protocol is CLIP_benchmark's: a class is the unit mean of its unit prompt embeddings, the
logits are 100 * cos.
An evaluation is never quietly smaller: whatever is missing or unreadable is an error that names it.
Letters: n samples, C classes, T prompts a class, P distinct prompts, m captions, E embedding.
"""
import hashlib
import io
import os
import re
import typing

import numpy as np
from torch.utils.data import Dataset

from data.images import DECODER_ERRORS, BadImage, open_image
from data.shards import BrokenTar, tar_members

# ------------------------------------------------------------------------------ the table of rows


class Row(typing.NamedTuple):
    """One benchmark of the paper: where it lives, what size it must have, what is published."""
    title: str
    family: str
    sets: tuple  # names in djghosh's home, then in clip-benchmark's where that differs
    n: int  # test images
    classes: int  # 0: retrieval
    main: str  # the metric that stands for the row in family means
    templates: int
    published: tuple  # OpenAI ViT-B/32 in %: acc1, acc5; retrieval: text to image @1 @5, back @1 @5


_ACC, _MPCR, _R1 = "acc1", "mean_per_class_recall", "mean_recall@1"
_OOD, _CLEVR = "imagenet-ood", "vtab-clevr_closest_object_distance"

# Sizes as the sets are published; figures as CLIP_benchmark published them for OpenAI's weights.
ROWS = (
    Row("ImageNet-1K", "imagenet", ("imagenet1k",), 50000, 1000, _ACC, 80, (63.3, 88.8)),
    Row("ImageNet-V2", _OOD, ("imagenetv2",), 10000, 1000, _ACC, 80, (56.0, 83.4)),
    Row("ImageNet-A", _OOD, ("imagenet-a",), 7500, 200, _ACC, 80, (31.4, 64.1)),
    Row("ImageNet-R", _OOD, ("imagenet-r",), 30000, 200, _ACC, 80, (69.3, 88.9)),
    Row("ImageNet-Sketch", _OOD, ("imagenet_sketch",), 50889, 1000, _ACC, 80, (42.3, 70.3)),
    Row("ImageNet-O", _OOD, ("imagenet-o",), 2000, 200, _ACC, 80, (47.8, None)),
    Row("ObjectNet", _OOD, ("objectnet",), 18574, 113, _ACC, 80, (44.2, 70.1)),
    Row("CIFAR-10", "vtab", ("cifar10", "vtab-cifar10"), 10000, 10, _ACC, 18, (89.8, 99.6)),
    Row("CIFAR-100", "vtab", ("vtab-cifar100",), 10000, 100, _ACC, 18, (64.5, 88.8)),
    Row("Caltech-101", "vtab", ("vtab-caltech101",), 6085, 102, _MPCR, 34, (81.9, 94.7)),
    Row("DTD", "vtab", ("vtab-dtd",), 1880, 47, _ACC, 8, (44.3, 76.4)),
    Row("EuroSAT", "vtab", ("vtab-eurosat",), 5400, 10, _ACC, 3, (50.7, 92.6)),
    Row("Flowers-102", "vtab", ("vtab-flowers",), 6149, 102, _MPCR, 1, (66.3, 85.7)),
    Row("Oxford-IIIT Pets", "vtab", ("vtab-pets",), 3669, 37, _MPCR, 1, (87.3, 99.3)),
    # clip-benchmark has 6 prompts for SVHN, and the published figures are with those
    Row("SVHN", "vtab", ("vtab-svhn",), 26032, 10, _ACC, 1, (12.4, 64.8)),
    Row("RESISC45", "vtab", ("vtab-resisc45",), 6300, 45, _ACC, 4, (53.8, 86.7)),
    Row("PatchCamelyon", "vtab", ("vtab-pcam",), 32768, 2, _ACC, 2, (62.2, None)),
    Row("CLEVR-Count", "vtab", ("vtab-clevr_count_all",), 15000, 8, _ACC, 1, (23.5, 78.7)),
    Row("CLEVR-Distance", "vtab", (_CLEVR,), 15000, 6, _ACC, 1, (17.2, 91.0)),
    Row("Stanford Cars", "fine-grained", ("cars",), 8041, 196, _ACC, 8, (59.4, 91.7)),
    Row("FGVC Aircraft", "fine-grained", ("fgvc_aircraft",), 3333, 100, _MPCR, 2, (19.7, 50.2)),
    Row("Food-101", "fine-grained", ("food101",), 25250, 101, _ACC, 1, (84.0, None)),
    Row("Country-211", "fine-grained", ("country211",), 21100, 211, _ACC, 5, (17.2, 40.2)),
    Row("MNIST", "misc", ("mnist",), 10000, 10, _ACC, 1, (48.6, 84.2)),
    Row("STL-10", "misc", ("stl10",), 8000, 10, _ACC, 2, (97.1, 99.9)),
    Row("GTSRB", "misc", ("gtsrb",), 12630, 43, _ACC, 3, (33.1, 72.5)),
    Row("KITTI distance", "misc", ("vtab-kitti_closest_vehicle_distance",), 711, 4, _ACC, 1,
        (27.4, None)),
    Row("Rendered SST2", "misc", ("renderedsst2",), 1821, 2, _ACC, 1, (59.0, None)),
    Row("Pascal VOC 2007", "misc", ("voc2007",), 14976, 20, _ACC, 1, (76.6, 96.0)),  # object crops
    Row("Flickr30k 1K", "retrieval", ("flickr30k",), 1000, 0, _R1, 0, (58.8, 83.6, 78.9, 94.9)),
    Row("MS-COCO 5K", "retrieval", ("mscoco_captions",), 5000, 0, _R1, 0, (30.4, 55.9, 50.1, 75.0)),
    Row("SUN397", "fine-grained", ("sun397",), 108754, 397, _ACC, 2, (62.5, 91.3)),
)
# The plan's 29th set: in neither public home, so it has no size to check against.
_BIRDSNAP = Row("Birdsnap", "fine-grained", ("birdsnap",), 0, 0, _ACC, 0, (None, None))
_PLAN = tuple(row for row in ROWS[:29] if row.title not in ("ImageNet-O", "ObjectNet"))
# Two lists of 29 exist for this paper: its group's script ran "code", a later plan names "plan".
LISTS = {"code": ROWS[:29] + ROWS[29:31], "plan": _PLAN + (ROWS[31], _BIRDSNAP) + ROWS[29:31]}
ROW_OF = {name: row for row in ROWS + (_BIRDSNAP,) for name in row.sets}
MAIN = {"classification": _ACC, "multilabel": "mean_average_precision", "retrieval": _R1}


def set_name(folder):
    """wds_<name>_test or wds_<name> -> <name>; None if the folder's name has neither form."""
    match = re.fullmatch(r"wds_(.+?)(_test)?", os.path.basename(os.path.normpath(folder)))
    return match and match[1]


def find_sets(folder):
    """{set name: folder} of every set below `folder`, in the order of names.

    A row's set goes by its first name whichever home it came from. Raises FileNotFoundError for
    a missing or empty folder and ValueError where two folders are the same set.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"benchmarks={folder}: no such folder; python -m data.prepare.toy draws "
                                "one, python -m data.prepare.benchmarks fetches the real sets")
    found = {}
    for entry in sorted(os.listdir(folder)):
        name = set_name(entry)
        if name is None or not os.path.isdir(os.path.join(folder, entry)):
            continue
        name = ROW_OF[name].sets[0] if name in ROW_OF else name
        if name in found:  # the two homes differ in prompts (SVHN), so no silent choice
            raise ValueError(f"{folder}: {os.path.basename(found[name])} and {entry} are the same "
                             "set; move one of them away")
        found[name] = os.path.join(folder, entry)
    if not found:
        raise FileNotFoundError(f"benchmarks={folder}: holds no folder wds_<name>_test")
    return found


def unlike_row(benchmark):
    """What differs from the row that a BenchmarkSet is named for, as a sentence; "" if nothing."""
    row = ROW_OF.get(benchmark.name)
    found = len(benchmark), len(benchmark.classnames)
    if row not in ROWS or found == (row.n, row.classes):
        return ""
    return (f"{benchmark.folder}: {found[0]:,} images in {found[1]:,} classes, but {row.title} has "
            f"{row.n:,} in {row.classes:,}")


# ------------------------------------------------------------------------------ one set on disk

_IMAGE_TYPES = ("webp", "png", "jpg", "jpeg")
_LABEL_TYPE = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}


class BenchmarkSet(Dataset):
    """One set, indexed by a pass over its tar headers; images are read when asked for.

    classnames, templates: lists of str (empty for retrieval).  labels: (n,) int64, (n,C) for
    multilabel, (m,) image index of each caption for retrieval.  captions: list of m str.
    fingerprints: sha256 of the class names, the templates, the samples (names, sizes, labels).
    Raises FileNotFoundError or ValueError that names the file, or the shard and member.
    """

    def __init__(self, folder):
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder}: no such benchmark set")
        self.folder, self.name = folder, set_name(folder) or os.path.basename(folder)
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

    def _index(self):
        """Note where each sample's image lies, and its label; sha256 of names, sizes and labels."""
        self._places, self._names, labels, self.captions = [], [], [], []
        digest = hashlib.sha256()
        for place, name, label, raw in self._scan():
            if self.type == "retrieval":
                labels += [len(self._places)] * len(label)
                self.captions += label
            else:
                labels.append(label)
            self._places.append(place)
            self._names.append(name)
            digest.update(f"{name} {place[2]} ".encode() + raw)
        if not self._places:
            raise ValueError(f"{self.folder}: its shards hold no samples")
        self.labels = np.array(labels, dtype=np.int64)
        return digest.hexdigest()

    def __len__(self):
        return len(self._places)

    def image(self, i):
        """Image i as Pillow RGB. Plain convert("RGB"), as the published figures were made."""
        path, offset, size = self._places[i]
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        try:
            return open_image(content).convert("RGB")
        except (BadImage, *DECODER_ERRORS) as error:
            raise ValueError(f"{path}: {self._names[i]}: undecodable image ({error})") from None

    def prompts(self):
        """C x T prompts; str.replace, because names may hold braces."""
        return [[template.replace("{c}", name) for template in self.templates]
                for name in self.classnames]

    def _text(self, name, default=None):
        path = os.path.join(self.folder, name)
        if default is not None and not os.path.exists(path):
            return default
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: missing; every set of type {self.type} needs it")
        try:
            with open(path, encoding="utf-8") as file:
                return file.read()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: is not UTF-8 text") from None

    def _lines(self, name):
        lines = [line.strip() for line in self._text(name).splitlines()]
        if not lines:
            raise ValueError(f"{self.folder}/{name}: is empty")
        return lines

    def _shards(self):
        """The shard paths in numeric order, all that nshards.txt promises and no other."""
        test, count = os.path.join(self.folder, "test"), self._text("test/nshards.txt").strip()
        if not count.isdecimal() or int(count) == 0:
            raise ValueError(f"{test}/nshards.txt: {count!r} is not a number of shards")
        wanted = [f"{number}.tar" for number in range(int(count))]
        present = {name for name in os.listdir(test) if name.endswith(".tar")}
        for name in wanted:
            if name not in present:
                raise FileNotFoundError(f"{test}/{name}: missing, nshards.txt says {count} shards")
        if extra := sorted(present - set(wanted)):
            raise ValueError(f"{test}/{extra[0]}: not among the {count} shards of nshards.txt")
        return [os.path.join(test, name) for name in wanted]

    def _scan(self):
        """Yield ((path, offset, size) of the image, name, label, label's bytes) of each sample."""
        for path in self._shards():
            key, parts = None, {}
            for name, place, content in read_members(path, "." + _LABEL_TYPE[self.type]):
                stem, _, extension = name.partition(".")
                if stem != key and key is not None:
                    yield self._sample(path, key, parts)
                if stem != key:
                    key, parts = stem, {}
                extension = extension.lower()
                if extension in parts:
                    raise ValueError(f"{path}: {key}.{extension} is there twice")
                parts[extension] = (place, content)
            if key is not None:
                yield self._sample(path, key, parts)

    def _sample(self, path, key, parts):
        """Put one sample together from its members {extension: (place, bytes)}."""
        images = [extension for extension in parts if extension in _IMAGE_TYPES]
        if len(images) != 1:
            raise ValueError(f"{path}: {key} has {len(images)} images ({', '.join(parts)}), "
                             f"must have one of {', '.join(_IMAGE_TYPES)}")
        kind = _LABEL_TYPE[self.type]
        if kind not in parts:
            raise ValueError(f"{path}: {key}.{kind} is missing (only {', '.join(parts)})")
        place, raw = parts[images[0]][0], parts[kind][1]
        try:
            label = self._label(kind, raw)
        except ValueError as error:
            raise ValueError(f"{path}: {key}.{kind}: {error}") from None
        return place, f"{key}.{images[0]}", label, raw

    def _label(self, kind, raw):
        """A label's bytes -> int, list of captions, or (C,) array of 0 and 1."""
        classes = len(self.classnames)
        if kind == "txt":
            captions = raw.decode().splitlines()  # UnicodeDecodeError is a ValueError
            if not captions:
                raise ValueError("no caption")
            return captions
        if kind == "npy":
            label = np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
            if label.shape != (classes,) or not np.isin(label, (0, 1)).all():
                raise ValueError(f"must be {classes} values of 0 or 1, as classnames.txt has lines")
            return label
        text = raw.decode("ascii").strip()
        if not text.isdecimal():
            raise ValueError(f"{text[:40]!r} is not a label")
        if int(text) >= classes:
            raise ValueError(f"label {int(text)}, but classnames.txt has {classes} lines "
                             f"(labels 0 to {classes - 1})")
        return int(text)


def read_members(path, suffix):
    """Yield (file name, (path, offset, size), bytes if the name ends in `suffix`, else None).

    In the tar's order. Raises ValueError for a shard that is damaged or ends early, also where it
    was cut between two members: a whole archive ends in a block of zeros.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for name, offset, size in tar_members(descriptor):
            name = os.path.basename(name.decode(errors="replace"))
            wanted = name.lower().endswith(suffix)
            yield name, (path, offset, size), os.pread(descriptor, size, offset) if wanted else None
        end = os.pread(descriptor, 512, max(0, os.fstat(descriptor).st_size - 512))
        if end != bytes(512):
            raise ValueError(f"{path}: broken shard, its end is missing; fetch it again")
    except BrokenTar as error:
        where = error.name.decode(errors="replace") or "a damaged header"
        raise ValueError(f"{path}: broken shard, at {where}; fetch it again") from None
    finally:
        os.close(descriptor)


def _sha256(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
