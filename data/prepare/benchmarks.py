"""Evaluation sets: fetches those of data/benchmarks.py's table, makes sets of your own.

    python -m data.prepare.benchmarks --list                        # the rows, and what is here
    python -m data.prepare.benchmarks --only=cifar10,vtab-dtd       # into data/benchmarks
    python -m data.prepare.benchmarks /big/disk --home=clip-benchmark   # all, the other home
    python -m data.prepare.benchmarks folders FOLDER TARGET         # FOLDER/cat/1.jpg is a cat
    python -m data.prepare.benchmarks folders FOLDER TARGET --labels=labels.csv   # file,label
    python -m data.prepare.benchmarks fashion-mnist FOLDER TARGET   # a set from files at hand

Both homes are on the Hugging Face hub; the same command goes on where it was stopped. "folders"
writes TARGET/wds_NAME_test: a class is called as its folder or label, with "_" as a space. A
picture that is unreadable or has no label is an error. "fashion-mnist" reads the files of
Debian's package dataset-fashion-mnist.
"""
import gzip
import io
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from configs import check_ranges, load_config
from data.benchmarks import ROWS, BenchmarkSet, find_sets, unlike_row
from data.images import BadImage
from data.log import run_main
from data.prepare.captions import LABEL_COLUMNS, match_names, read_texts
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
    templates: str = ""    # a file of prompts; default: "a photo of a {c}."

    def check(self):
        check_ranges(self, home=tuple(HOMES))


# ---------------------------------------------------------------------------- published sets

def choose_rows(only):
    """Rows named by `only`: comma-separated set names of either home; "": all of the table."""
    by_name = {name: row for row in ROWS for name in row.sets}
    chosen = []
    for name in only.split(",") if only else by_name:
        if name not in by_name:
            raise ValueError(f"--only={name}: no such set; --list shows the names")
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
    commit, sizes = list_files(f"{home}/{name}")
    wanted = [path for path in sizes if WANTED.fullmatch(path)]
    print(f"{row.title}: {len(wanted)} files of {home}/{name}", flush=True)
    for path in wanted:
        fetch_file(f"{home}/{name}", commit, path, target / name)
    check(target / name)
    return target / name


def check(folder):
    """Read the set's index; ValueError unless it has its row's images and classes."""
    difference = unlike_row(BenchmarkSet(folder))
    if difference:
        raise ValueError(f"{difference}; remove the folder and start again")


def show(rows, target):
    """Print one line a row: title, size, whether it is here and whole, names of the set."""
    here = find_sets(target) if any(target.glob("wds_*")) else {}
    for row in rows:
        state = "absent"
        if row.sets[0] in here:
            try:
                check(here[row.sets[0]])
                state = "complete"
            except (ValueError, FileNotFoundError):
                state = "INCOMPLETE"
        print(f"{row.title:<18}{row.n:>8,} images{row.classes or '-':>6} classes  {state:<12}"
              f"{', '.join(row.sets)}")


# ---------------------------------------------------------------------------- sets of your own

def from_folders(folder, target, config):
    """Write the pictures below `folder` as a classification set; returns the set's folder."""
    pictures, _ = find_pictures(folder)
    labels = {name: name.partition("/")[0] for name in pictures if "/" in name}
    if config.labels:
        labels = labels_of_table(folder, pictures, Path(config.labels))
    without = [name for name in pictures if name not in labels]
    if without:
        raise ValueError(f"{folder}: {len(without)} pictures lie in no class folder or in "
                         f"no row: {', '.join(without[:5])}")
    classes = sorted(set(labels.values()))
    if all(label.isdecimal() for label in classes):
        raise ValueError(f"labels are numbers ({', '.join(classes[:5])}); write the names of "
                         "the classes, of which prompts are made")
    templates = ["a photo of a {c}."]
    if config.templates:
        templates = Path(config.templates).read_text(encoding="utf-8-sig").split("\n")
        templates = [line.strip() for line in templates if line.strip()]
    if not all("{c}" in template for template in templates):
        raise ValueError(f"{config.templates}: each line needs {{c}}, where the class is named")

    def samples():
        for i, name in enumerate(pictures):
            try:
                data = (folder / name).read_bytes()
                kind, data = shrink(data, short_side=10**9, quality=95)  # at its own size
            except BadImage as error:
                raise ValueError(f"{folder / name}: unreadable ({error})") from None
            yield f"s{i:07d}", kind, data, classes.index(labels[name])

    classnames = [label.replace("_", " ") for label in classes]
    return write_set(target, config.name or folder.resolve().name, classnames, templates,
                     samples(), family="own", per_shard=1000)


def labels_of_table(folder, pictures, file):
    """{picture: label} of a table; ValueError for a row without a picture or a clear label."""
    table, labels = {}, {}
    for name, texts in read_texts(file, LABEL_COLUMNS):
        table.setdefault(name, []).extend(texts)
    matched, missing = match_names(table, pictures, folder)
    if missing:
        raise ValueError(f"{file}: {': '.join(missing[0])} ({len(missing)} of such)")
    for name, texts in matched.items():
        found = {(text or "").strip() for text in texts}
        if len(found) > 1 or "" in found:
            raise ValueError(f"{file}: {name} needs one label, has {sorted(found)}")
        labels[name] = found.pop()
    return labels


def read_idx(path):
    """An idx-gz file of unsigned bytes (MNIST's format) -> uint8 array of its stated shape."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error):
        raise ValueError(f"{path}: cut short or damaged; fetch it again") from None
    dimensions = content[3]  # behind two zeros and an 8 for unsigned bytes
    shape = np.frombuffer(content, ">i4", count=dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


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
    config, others = load_config(Config, globals(), argv, files=3)
    command = others[0] if others else ""
    if command in ("folders", "fashion-mnist"):
        if len(others) != 3:
            raise ValueError(f"write: ... data.prepare.benchmarks {command} FOLDER TARGET")
        source, target = Path(others[1]), Path(others[2])
        if command == "folders":
            print(from_folders(source, target, config))
        else:
            print(fashion_mnist(source, target))
        return
    target = Path(command or "data/benchmarks")
    rows, failed = choose_rows(config.only), []
    if config.list:
        show(rows, target)
        return
    for row in rows:
        try:
            print(f"{row.title}: complete in {fetch(row, target, config.home)}")
        except (ValueError, FileNotFoundError) as error:  # which does not keep the others
            failed.append(f"{row.sets[0]} ({error})")
    if failed:
        raise ValueError(f"{len(failed)} of {len(rows)} sets failed: {'; '.join(failed)}")


if __name__ == "__main__":
    run_main(main)
