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
import shutil
import time
import typing

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from data.images import DECODER_ERRORS, BadImage, eval_image, normalise, open_image
from data.progress import Progress
from data.shards import BrokenTar, tar_members, write_tar
from data.triplets import two_afc

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
_MAIN = {"classification": _ACC, "multilabel": "mean_average_precision", "retrieval": _R1}


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
        raise FileNotFoundError(f"benchmarks={folder}: no such folder; python -m data.toy draws "
                                "one, python -m data.prepare_benchmarks fetches the real sets")
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


def write_set(folder, name, classnames, templates, samples, family=None,
              dataset_type="classification", per_shard=10_000):
    """Write folder/wds_<name>_test in the layout above, whole or not at all; returns its path.

    samples: iterable of (key, extension, image bytes, label); label: int, list of captions
    (retrieval), or (C,) array of 0 and 1 (multilabel).  family: the row group it is averaged in.
    """
    target = os.path.join(folder, f"wds_{name}_test")
    if os.path.exists(target):
        raise ValueError(f"{target}: exists; remove it to write it anew")
    draft = os.path.join(folder, f".{name}.tmp")  # find_sets passes it over
    shutil.rmtree(draft, ignore_errors=True)  # left by an interrupted run
    os.makedirs(os.path.join(draft, "test"))
    texts = {"dataset_type.txt": dataset_type}
    if family:
        texts["family.txt"] = family
    if dataset_type != "retrieval":
        texts["classnames.txt"] = "\n".join(classnames)
        texts["zeroshot_classification_templates.txt"] = "\n".join(templates)
    members, shards = [], 0
    for key, extension, image, label in samples:
        members.append((f"{key}.{extension}", image))
        members.append((f"{key}.{_LABEL_TYPE[dataset_type]}", _label_bytes(dataset_type, label)))
        if len(members) == 2 * per_shard:
            write_tar(os.path.join(draft, "test", f"{shards}.tar"), members)
            members, shards = [], shards + 1
    if members:
        write_tar(os.path.join(draft, "test", f"{shards}.tar"), members)
        shards += 1
    for file_name, text in {**texts, "test/nshards.txt": str(shards)}.items():
        with open(os.path.join(draft, file_name), "w", encoding="utf-8") as file:
            file.write(text + "\n")
    os.replace(draft, target)
    return target


def _sha256(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _label_bytes(dataset_type, label):
    if dataset_type == "retrieval":
        return "\n".join(label).encode()
    if dataset_type == "classification":
        return str(int(label)).encode()
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(label, dtype=np.uint8))
    return buffer.getvalue()


# ------------------------------------------------------------------------------ metrics
# Ties are broken as CLIP_benchmark breaks them, so that its figures come out: top-k by torch.topk,
# the per-class recall by argmax (lowest label first), the precision by a descending sort.


def class_vectors(prompts, rows):
    """Unit class vectors from unit prompt embeddings (P,E); rows (C,T): each class's prompts."""
    means = torch.stack([prompts[row].mean(0) for row in rows])  # (C,T) rows of (P,E) -> (C,E)
    return F.normalize(means, dim=-1)


def top_k_hits(logits, labels, ks):
    """{k: (n,) bool, whether the label is among the k largest of its row} for logits (n,C)."""
    order = logits.topk(max(ks), dim=1).indices  # (n,C) -> (n,k)
    right = order == labels[:, None]
    return {k: right[:, :k].any(1) for k in ks}


def mean_per_class_recall(right, labels):
    """Mean, over the classes present, of the share of right (n,) among the class's samples."""
    counts = np.bincount(labels)
    return float((np.bincount(labels, weights=right)[counts > 0] / counts[counts > 0]).mean())


def average_precision(scores, truth):
    """Mean of the precision at each positive; scores (n,), truth (n,) bool; 0 without positives."""
    truth = truth[scores.sort(descending=True, stable=True).indices].double()
    precision = truth.cumsum(0) / torch.arange(1, len(truth) + 1)
    return float((precision * truth).sum() / truth.sum().clamp(min=1))


def recall_hits(queries, gallery, query_image, gallery_image, ks=(1, 5, 10)):
    """{k: (q,) bool, whether something of the query's image is among its k nearest}.

    queries (q,E), gallery (g,E); *_image: index of the image that each belongs to.
    """
    hits = {k: [] for k in ks}
    for start in range(0, len(queries), 1024):  # 1024 x 25,010 scores are 100 MB
        scores = queries[start:start + 1024] @ gallery.T  # (b,E) x (E,g) -> (b,g)
        own = query_image[start:start + 1024, None]
        for k in ks:
            nearest = gallery_image[scores.topk(min(k, len(gallery)), dim=1).indices]  # (b,k)
            hits[k].append((nearest == own).any(1))
    return {k: torch.cat(parts) for k, parts in hits.items()}


def classify(images, classes, labels):
    """Metrics and per-sample hits of images (n,E) against class vectors (C,E)."""
    ks = (1, 5) if len(classes) >= 5 else (1,)  # below 5 classes top-5 means nothing
    top, best = {k: [] for k in ks}, []
    labels = torch.as_tensor(labels)
    for start in range(0, len(images), 1024):
        logits = 100.0 * images[start:start + 1024] @ classes.T  # (b,E) x (E,C) -> (b,C)
        part = labels[start:start + 1024]
        for k, right in top_k_hits(logits, part, ks).items():
            top[k].append(right)
        best.append(logits.argmax(1) == part)
    hits = {f"acc{k}": torch.cat(top[k]).numpy() for k in ks}
    hits["mean_per_class_recall"] = torch.cat(best).numpy()
    metrics = {"acc1": float(hits["acc1"].mean()),
               "acc5": float(hits["acc5"].mean()) if "acc5" in hits else None}
    metrics["mean_per_class_recall"] = mean_per_class_recall(hits["mean_per_class_recall"],
                                                             labels.numpy())
    return metrics, {**hits, "labels": labels.numpy()}


def rank_labels(images, classes, truth):
    """Mean average precision of images (n,E) against class vectors (C,E); truth (n,C) of 0, 1."""
    logits = 100.0 * images @ classes.T  # (n,E) x (E,C) -> (n,C)
    truth = torch.as_tensor(truth).bool()
    precision = [average_precision(logits[:, c], truth[:, c]) for c in range(len(classes))]
    return {"mean_average_precision": float(np.mean(precision))}, {}


def retrieve(images, captions, image_of):
    """Recalls both ways; images (n,E), captions (m,E), image_of (m,): each caption's image."""
    own, image_of = torch.arange(len(images)), torch.as_tensor(image_of)
    hits = {}
    for name, found in (("image", recall_hits(captions, images, image_of, own)),
                        ("text", recall_hits(images, captions, own, image_of))):
        hits.update({f"{name}_retrieval_recall@{k}": right.numpy() for k, right in found.items()})
    metrics = {name: float(right.mean()) for name, right in hits.items()}
    metrics["mean_recall@1"] = (metrics["image_retrieval_recall@1"]
                                + metrics["text_retrieval_recall@1"]) / 2
    return metrics, {**hits, "image_of": image_of.numpy()}


# ------------------------------------------------------------------------------ embedding passes


class Pixels(Dataset):
    """Preprocessed images for `embed`; an error travels as text: workers garble exceptions.

    benchmark: anything with a length and image(i) -> Pillow RGB.  size: S.
    """

    def __init__(self, benchmark, size):
        self.benchmark, self.size = benchmark, size

    def __len__(self):
        return len(self.benchmark)

    def __getitems__(self, indices):
        try:
            return torch.stack([eval_image(self.benchmark.image(i), self.size) for i in indices])
        except ValueError as error:
            return str(error)


def embed(encode, items, device, batch_size, workers=0, dtype="float32", ranks=None, label=""):
    """Embeddings of all images, in order, on the CPU, the same on every rank: (n,E) float32.

    items: Dataset whose __getitems__(list of indices) gives uint8 (b,3,S,S), or an error's text.
    Whole batches are dealt to the ranks (data.ranks.Ranks; None: alone): a batch meets the same
    arithmetic at any world size, and no sample is padded, dropped or counted twice.
    label: what the progress line calls it, "" for no such line.
    """
    batches = _dealt([range(i, min(i + batch_size, len(items)))
                      for i in range(0, len(items), batch_size)], ranks)
    loader = DataLoader(items, batch_sampler=batches, num_workers=workers, collate_fn=_as_is,
                        pin_memory=device.type == "cuda")
    parts, error, progress = [], None, _progress(label, batches, "images", ranks)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16"):
        for pixels in loader:  # within one autocast, which converts the weights once
            if isinstance(pixels, str):
                error = pixels
                break
            parts.append(encode(normalise(pixels.to(device, non_blocking=True))).float().cpu())
            if progress:
                progress.add(len(pixels))
    return torch.cat(_exchange(parts, error, ranks))


def embed_texts(clip, tokenizer, texts, cache, device, batch_size=1024, dtype="float32",
                ranks=None, label=""):
    """Unit embeddings of texts (list of str) as (len(texts),E) float32 on the CPU.

    cache: dict text -> (E,), read and extended, so that a run encodes each distinct text once.
    New texts run in the order of their length: encode_text cuts each batch to its longest.
    """
    new = sorted(set(texts) - cache.keys(), key=lambda text: (len(text), text))
    batches = [new[i:i + batch_size] for i in range(0, len(new), batch_size)]
    own = _dealt(batches, ranks)
    parts, progress = [], _progress(label, own, "texts", ranks)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16"):
        for batch in own:
            tokens = tokenizer(batch, clip.config.context_length)  # (b,L) int64
            parts.append(clip.encode_text(tokens).float().cpu())
            if progress:
                progress.add(len(batch))
    for batch, part in zip(batches, _exchange(parts, None, ranks)):
        cache.update(zip(batch, part))
    return torch.stack([cache[text] for text in texts])  # (len(texts),E)


def _dealt(batches, ranks):
    """The batches of this rank: one in `world`."""
    return batches[ranks.rank::ranks.world] if ranks else batches


def _progress(label, batches, unit, ranks):
    """Rank 0's progress line; it counts its own batches, the others keep its pace."""
    shown = label and (ranks is None or ranks.rank == 0)
    return Progress(label, sum(map(len, batches)), unit) if shown else None


def _exchange(parts, error, ranks):
    """All ranks' batches in their order; an error of any rank is raised on every rank."""
    everyone = ranks.collect((parts, error)) if ranks else [(parts, error)]
    for _, message in everyone:
        if message is not None:
            raise ValueError(message)
    world, total = len(everyone), sum(len(part) for part, _ in everyone)
    return [everyone[i % world][0][i // world] for i in range(total)]


def _as_is(batch):
    return batch


def evaluate_set(clip, tokenizer, folder, batch_size=256, workers=0, dtype="float32", prompts=None,
                 ranks=None, label=""):
    """Zero-shot metrics of one CLIP on one set, in one pass over its images.

    clip: encode_image (b,3,S,S) -> (b,E) unit, encode_text (b,L) -> (b,E) unit, .config and
    .logit_scale, whose device is used.  folder: path or BenchmarkSet.  prompts: embed_texts' cache,
    to share between sets.  ranks: a Ranks that ALL its processes call this with, or None: alone.
    Returns a dict: metrics {name: value in 0..1, acc5 None below 5 classes}, main (the metric for
    family means), family, type, n, classes, templates, captions, partial (unlike its row),
    classnames_sha256, templates_sha256, samples_sha256, seconds, and hits {metric: (n,) or (m,)}.
    """
    benchmark = folder if isinstance(folder, BenchmarkSet) else BenchmarkSet(folder)
    device, start = clip.logit_scale.device, time.time()
    how = {"device": device, "dtype": dtype, "ranks": ranks, "label": label}
    texts = benchmark.captions or [prompt for row in benchmark.prompts() for prompt in row]
    cache = {} if prompts is None else prompts
    text_embeddings = embed_texts(clip, tokenizer, texts, cache, **how)  # (m,E) or (C*T,E)
    images = embed(clip.encode_image, Pixels(benchmark, clip.config.image_size),
                   batch_size=batch_size, workers=workers, **how)  # (n,E)
    if benchmark.type == "retrieval":
        metrics, hits = retrieve(images, text_embeddings, benchmark.labels)
    else:
        shape = len(benchmark.classnames), len(benchmark.templates)
        classes = class_vectors(text_embeddings, torch.arange(len(texts)).view(shape))
        measure = classify if benchmark.type == "classification" else rank_labels
        metrics, hits = measure(images, classes, benchmark.labels)
    row = ROW_OF.get(benchmark.name)
    return {"metrics": metrics, "main": row.main if row else _MAIN[benchmark.type],
            "family": row.family if row else benchmark.family, "type": benchmark.type,
            "n": len(benchmark), "classes": len(benchmark.classnames),
            "templates": len(benchmark.templates), "captions": len(benchmark.captions),
            "partial": bool(unlike_row(benchmark)),
            **benchmark.fingerprints, "seconds": round(time.time() - start, 2), "hits": hits}


class _TripletPixels(Dataset):
    """Triplets as items of `embed`: an index is a triplet, that is three images."""

    def __init__(self, triplets, size):
        self.triplets, self.size = triplets, size

    def __len__(self):
        return len(self.triplets)

    def __getitems__(self, rows):
        try:
            return self.triplets.load(self.size, rows).flatten(0, 1)  # (b,3,3,S,S) -> (3b,3,S,S)
        except ValueError as error:
            return str(error)


def evaluate_triplets(encode, triplets, size, device, batch_size=256, workers=0, dtype="float32",
                      ranks=None, label=""):
    """2AFC of an image tower on triplets: {"nights": task} as evaluate_set has it.

    encode: (b,3,S,S) -> (b,E) unit.  Where the file tells ImageNet's triplets apart, also
    "nights-imagenet" and "nights-no-imagenet".  Ties count half.
    """
    start = time.time()
    embeddings = embed(encode, _TripletPixels(triplets, size), device, max(1, batch_size // 3),
                       workers, dtype, ranks, label).unflatten(0, (-1, 3))  # (3n,E) -> (n,3,E)
    scores = two_afc(*embeddings.unbind(1), torch.from_numpy(triplets.labels)).numpy()  # (n,)
    parts = {"nights": np.ones(len(scores), bool)}
    if triplets.is_imagenet is not None:
        parts |= {"nights-imagenet": triplets.is_imagenet,
                  "nights-no-imagenet": ~triplets.is_imagenet}
    return {name: {"metrics": {"2afc": float(scores[part].mean(dtype=float))}, "main": "2afc",
                   "family": "nights", "part_of": None if name == "nights" else "nights",
                   "type": "2afc", "n": int(part.sum()), "classes": 2, "templates": 0,
                   "captions": 0, "samples_sha256": triplets.fingerprint,
                   "seconds": round(time.time() - start, 2), "hits": {"2afc": scores[part]}}
            for name, part in parts.items() if part.any()}
