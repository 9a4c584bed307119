"""Evaluation sets: fetches those of data/benchmarks.py's table, makes sets of your own.

    python -m data.prepare.benchmarks --list                        # the rows, and what is here
    python -m data.prepare.benchmarks --only=cifar10,vtab-dtd       # into data/benchmarks
    python -m data.prepare.benchmarks /big/disk --home=clip-benchmark   # all, the other home
    python -m data.prepare.benchmarks folders FOLDER TARGET         # FOLDER/cat/1.jpg is a cat
    python -m data.prepare.benchmarks folders FOLDER TARGET --labels=labels.csv   # file,label
    python -m data.prepare.benchmarks fashion-mnist FOLDER TARGET   # a set from files at hand

Both homes are on the Hugging Face hub (pip install huggingface_hub) and hold the layout that
evaluate.py reads: a set is a copy of its files. The same command goes on where it was stopped.

"folders" writes TARGET/wds_NAME_test. A class is called as its folder, or as its label in the
table, with "_" as a space; templates are one a line, with {c} for the name. A picture that is
unreadable or has no label is an error: a set is never quietly smaller.

"fashion-mnist" reads the idx-gz files that Debian's package dataset-fashion-mnist installs in
/usr/share/datasets/fashion-mnist: not a row of the paper, but a real set without any account.
"""
import difflib
import gzip
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from configs import load_config
from data.benchmarks import ROWS, BenchmarkSet, find_sets, unlike_row
from data.images import BadImage
from data.log import run_main
from data.prepare.captions import match_names, read_labels
from data.prepare.hub import fetch_file, list_files
from data.prepare.own import find_pictures, shrink
from data.prepare.tars import write_set

HOMES = {"djghosh": "wds_{}_test", "clip-benchmark": "wds_{}"}  # owner: form of a set's name
# A set's own files; the homes also keep a README and git's attributes.
WANTED = re.compile(r"(classnames|zeroshot_classification_templates|dataset_type)\.txt"
                    r"|test/(nshards\.txt|\d+\.tar)")
FASHION = ("t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt",
           "sneaker", "bag", "ankle boot")  # labels 0 to 9
FASHION_PROMPTS = ("a photo of a {c}.", "a black and white photo of a {c}.", "a {c}.",
                   "a small picture of a {c} on a black background.")


@dataclass
class Config:
    only: str = ""         # set names, comma-separated; default: all 32 rows
    home: str = "djghosh"  # or clip-benchmark
    list: bool = False     # show the rows and what is here
    # of "folders":
    name: str = ""         # of the set; default: FOLDER's own
    labels: str = ""       # a table of file and label; default: the folders are the labels
    classnames: str = ""   # a file that names numbered labels: its first line is label 0
    templates: str = ""    # a file of prompts; default: "a photo of a {c}."

    def check(self):
        if self.home not in HOMES:
            raise ValueError(f"home={self.home}: must be one of {', '.join(HOMES)}")


# ---------------------------------------------------------------------------- published sets

def choose_rows(only):
    """Rows named by `only`: comma-separated set names of either home; "": all of the table."""
    if not only:
        return list(ROWS)
    by_name = {name: row for row in ROWS for name in row.sets}
    chosen = []
    for name in only.split(","):
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, 1)
            hint = f"did you mean {near[0]}?" if near else "--list shows the names"
            raise ValueError(f"--only={name}: no such set; {hint}")
        if by_name[name] not in chosen:
            chosen.append(by_name[name])
    return chosen


def fetch(row, target, home):
    """Copy a row's set from `home` into target/; returns its checked folder.

    Raises ValueError or FileNotFoundError, also where the set's size differs from the row's.
    """
    if row.family == "retrieval":
        home = "clip-benchmark"  # the other home has no retrieval sets in this layout
    name = HOMES[home].format(row.sets[-1] if home == "clip-benchmark" else row.sets[0])
    other = present(target).get(row.sets[0])
    if other and other.name != name:  # the homes differ in prompts, so one of them must go
        raise ValueError(f"{other} is the same set from the other home; move it away")
    commit, sizes = list_files(f"{home}/{name}")
    wanted = [path for path in sizes if WANTED.fullmatch(path)]
    size = sum(sizes[path] or 0 for path in wanted)
    print(f"{row.title}: {home}/{name}, {len(wanted)} files, {size / 1e6:,.0f} MB", flush=True)
    for path in wanted:
        fetch_file(f"{home}/{name}", commit, path, target / name)
    check(target / name)
    return target / name


def check(folder):
    """Read the set's index; ValueError unless it has its row's images and classes."""
    difference = unlike_row(BenchmarkSet(folder))
    if difference:
        raise ValueError(f"{difference}; remove the folder and start again")


def present(target):
    """{set name: Path} of the sets in `target`, complete or not; {} where there are none."""
    if not any(folder.is_dir() for folder in target.glob("wds_*")):
        return {}
    return {name: Path(folder) for name, folder in find_sets(target).items()}


def show(rows, target):
    """Print one line a row: names, size, and whether it is here and whole."""
    here = present(target)
    print(f"{'row':>3} {'title':<18}{'images':>8}{'classes':>8}  {f'in {target}':<24}set names")
    for row in rows:
        state = "absent"
        if row.sets[0] in here:
            folder = here[row.sets[0]]
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            try:
                check(folder)
                state = f"complete, {size / 1e6:,.0f} MB"
            except (ValueError, FileNotFoundError):
                state = f"INCOMPLETE, {size / 1e6:,.0f} MB"
        print(f"{ROWS.index(row) + 1:>3} {row.title:<18}{row.n:>8,}{row.classes or '-':>8}  "
              f"{state:<24}{', '.join(row.sets)}")


def fetch_all(rows, target, home):
    """Fetch each row's set; one that fails does not keep the others. Raises ValueError."""
    failed = []
    for row in rows:
        try:
            print(f"{row.title}: complete in {fetch(row, target, home)}")
        except (ValueError, FileNotFoundError) as error:
            failed.append(f"{row.sets[0]} ({error})")
    if failed:
        raise ValueError(f"{len(failed)} of {len(rows)} sets failed: {'; '.join(failed)}")


# ---------------------------------------------------------------------------- sets of your own

def from_folders(folder, target, config):
    """Write the pictures below `folder` as a classification set; returns the set's folder."""
    pictures, _ = find_pictures(folder)
    if config.labels:
        labels = labels_of_table(folder, pictures, Path(config.labels))
    else:
        labels = labels_of_folders(folder, pictures)
    classnames, numbers = name_classes(sorted(set(labels.values())), config.classnames)
    templates = ["a photo of a {c}."]
    if config.templates:
        templates = read_lines(config.templates)
    for template in templates:
        if "{c}" not in template:
            raise ValueError(f"{config.templates}: {template!r} has no {{c}} for the class")

    def samples():
        for i, name in enumerate(pictures):
            try:
                data = (folder / name).read_bytes()
                kind, data = shrink(data, short_side=10**9, quality=95)  # at its own size
            except (BadImage, OSError) as error:
                raise ValueError(f"{folder / name}: unreadable ({error})") from None
            yield f"s{i:07d}", kind, data, numbers[labels[name]]

    name = config.name or folder.resolve().name
    return write_set(target, name, classnames, templates, samples(), family="own",
                     per_shard=1000)


def labels_of_folders(folder, pictures):
    """{picture: the folder in `folder` that it lies in}. Raises ValueError."""
    labels = {}
    for name in pictures:
        label, slash, _ = name.partition("/")
        if not slash:
            raise ValueError(f"{folder}/{name}: lies in no class folder; move it, or give "
                             "--labels=TABLE with the columns file and label")
        labels[name] = label
    return labels


def labels_of_table(folder, pictures, table):
    """{picture: label} of a table; ValueError for a picture or a row without its other."""
    matched, missing = match_names(read_labels(table), pictures, folder)
    for name, reason in missing:
        raise ValueError(f"{table}: {name}: {reason} ({len(missing)} of such)")
    labels = {}
    for name in pictures:
        found = sorted(set(matched.get(name, [])))
        if not found:
            count = len(set(pictures) - set(matched))
            raise ValueError(f"{table}: no label for {name} ({count} of such)")
        if len(found) > 1:
            raise ValueError(f"{table}: {name} has the labels {', '.join(found)}")
        labels[name] = found[0]
    return labels


def name_classes(labels, file):
    """Sorted labels -> (names of the classes, {label: number of its class}). Raises ValueError.

    file: the names of numbered labels, label 0 in the first line; "": labels are names.
    """
    if not file:
        if all(label.isdecimal() for label in labels):
            raise ValueError(f"labels are numbers ({', '.join(labels[:5])}); name them with "
                             "--classnames=FILE, whose first line is label 0")
        names = [label.replace("_", " ") for label in labels]
        return names, {label: number for number, label in enumerate(labels)}
    names = read_lines(file)
    numbers = {}
    for label in labels:
        if not label.isdecimal() or int(label) >= len(names):
            raise ValueError(f"label {label!r}: {file} names labels 0 to {len(names) - 1}")
        numbers[label] = int(label)
    return names, numbers


def read_lines(file):
    """The lines of a text file that are not blank."""
    lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


def read_idx(path):
    """An idx-gz file of unsigned bytes (MNIST's format) -> uint8 array of its stated shape."""
    with gzip.open(path) as file:
        content = file.read()
    if content[:3] != b"\0\0\x08":  # two zeros, then 8 for unsigned bytes, then the dimensions
        raise ValueError(f"{path}: not an idx file of bytes")
    head = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:head], dtype=">i4")
    if len(content) != head + shape.prod():
        raise ValueError(f"{path}: {len(content) - head:,} bytes of data, "
                         f"its head says {shape}")
    return np.frombuffer(content[head:], dtype=np.uint8).reshape(shape)


def fashion_mnist(folder, target):
    """Write Fashion-MNIST's test half (10,000 images of 28 x 28, 10 classes) as a set."""
    images = read_idx(folder / "t10k-images-idx3-ubyte.gz")  # (n, 28, 28)
    labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz")  # (n,)

    def samples():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            yield f"s{i:07d}", "png", file.getvalue(), int(label)

    return write_set(target, "fashion_mnist", FASHION, FASHION_PROMPTS, samples(),
                     family="extra")


def main(argv=None):
    config, others = load_config(Config, globals(), argv)
    command = others[0] if others else ""
    if command in ("folders", "fashion-mnist"):
        if len(others) != 3:
            raise ValueError(f"write: ... data.prepare.benchmarks {command} FOLDER TARGET")
        folder, target = Path(others[1]), Path(others[2])
        if command == "folders":
            print(from_folders(folder, target, config))
        else:
            print(fashion_mnist(folder, target))
        return
    if len(others) > 1:
        raise ValueError("write: python -m data.prepare.benchmarks [TARGET] [--key=value ...]")
    target = Path(command or "data/benchmarks")
    rows = choose_rows(config.only)
    if config.list:
        show(rows, target)
    else:
        fetch_all(rows, target, config.home)


if __name__ == "__main__":
    run_main(main)
