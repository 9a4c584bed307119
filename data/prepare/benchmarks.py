"""Fetches the evaluation sets of data/benchmarks.py's table and checks each against its row.

    python -m data.prepare.benchmarks --list                          # the rows, and what is here
    python -m data.prepare.benchmarks --only=cifar10,vtab-dtd         # into data/benchmarks
    python -m data.prepare.benchmarks /big/disk --home=clip-benchmark # all rows, the other home
    python -m data.prepare.benchmarks fashion-mnist FOLDER TARGET     # a set from files at hand

Both homes are on the Hugging Face hub and hold the layout that evaluate.py reads, so a set is a
copy of its files; the same command goes on where it was stopped. FOLDER of the last form holds the
idx-gz files of Fashion-MNIST, as Debian's package dataset-fashion-mnist installs them in
/usr/share/datasets/fashion-mnist: not a row of the paper, but a real set without any account.
"""
import argparse
import difflib
import gzip
import io
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from data.benchmarks import ROWS, BenchmarkSet, find_sets, unlike_row
from data.log import run_main
from data.prepare.download import download, hub_files
from data.prepare.tars import write_set

HOMES = {"djghosh": "wds_{}_test", "clip-benchmark": "wds_{}"}  # owner: form of a set's name
# A set's own files; the homes also keep a README and git's attributes.
WANTED = re.compile(r"(classnames|zeroshot_classification_templates|dataset_type)\.txt"
                    r"|test/(nshards\.txt|\d+\.tar)")
FASHION = ("t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
           "bag", "ankle boot")  # labels 0 to 9
FASHION_PROMPTS = ("a photo of a {c}.", "a black and white photo of a {c}.", "a {c}.",
                   "a small picture of a {c} on a black background.")


def choose_rows(only):
    """Rows named by `only`: comma-separated set names of either home; None: all of the table."""
    by_name = {name: row for row in ROWS for name in row.sets}
    if only is None:
        return list(ROWS)
    for name in only.split(","):
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, 1)
            raise ValueError(f"--only={name}: no such set; "
                             + (f"did you mean {near[0]}?" if near else "--list shows the names"))
    return list(dict.fromkeys(by_name[name] for name in only.split(",")))


def fetch(row, target, home, hub):
    """Copy a row's set from `home` at the address `hub` into target/; returns its checked folder.

    Raises ValueError or FileNotFoundError, also where the set's size differs from the row's.
    """
    if row.family == "retrieval":
        home = "clip-benchmark"  # the other home has no retrieval sets in this layout
    name = HOMES[home].format(row.sets[-1] if home == "clip-benchmark" else row.sets[0])
    other = present(target).get(row.sets[0])
    if other and other.name != name:  # the homes differ in prompts, so one of them must go
        raise ValueError(f"{other} is the same set from the other home; move it away")
    files = [file for file in hub_files(f"{hub}/datasets/{home}/{name}")
             if WANTED.fullmatch(file.path)]
    size = sum(file.size for file in files)
    print(f"{row.title}: {name} of {home}, {len(files)} files, {size / 1e6:,.0f} MB", flush=True)
    for file in files:
        download(file.url, target / name / file.path, file.size, file.sha256)
    check(target / name)
    return target / name


def check(folder):
    """Read the set's index; ValueError unless it has its row's images and classes."""
    if difference := unlike_row(BenchmarkSet(folder)):
        raise ValueError(f"{difference}; remove the folder and start again")


def present(target):
    """{set name: Path} of the sets in `target`, complete or not; {} where there are none."""
    if not any(folder.is_dir() for folder in Path(target).glob("wds_*")):
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


def read_idx(path):
    """An idx-gz file of unsigned bytes (MNIST's format) -> uint8 array of its stated shape."""
    with gzip.open(path) as file:
        content = file.read()
    if content[:3] != b"\0\0\x08":  # two zeros, then 8 for unsigned bytes, then the dimensions
        raise ValueError(f"{path}: not an idx file of bytes")
    head = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:head], dtype=">i4")
    if len(content) != head + shape.prod():
        raise ValueError(f"{path}: {len(content) - head:,} bytes of data, its head says {shape}")
    return np.frombuffer(content[head:], dtype=np.uint8).reshape(shape)


def fashion_mnist(folder, target):
    """Write Fashion-MNIST's test half (10,000 images of 28 x 28, 10 classes) as a set."""
    folder = Path(folder)
    images = read_idx(folder / "t10k-images-idx3-ubyte.gz")  # (n, 28, 28)
    labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz")  # (n,)

    def samples():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            yield f"s{i:07d}", "png", file.getvalue(), int(label)

    return write_set(target, "fashion_mnist", FASHION, FASHION_PROMPTS, samples(), family="extra")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("python -m data.prepare.benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if argv[:1] == ["fashion-mnist"]:
        parser.add_argument("set")
        parser.add_argument("folder", help="holds t10k-images-idx3-ubyte.gz and its labels")
        parser.add_argument("target", help="folder that gets wds_fashion_mnist_test")
        args = parser.parse_args(argv)
        print(fashion_mnist(args.folder, args.target))
        return
    parser.add_argument("target", nargs="?", default="data/benchmarks", type=Path)
    parser.add_argument("--only", help="set names, comma-separated; default: all 32 rows")
    parser.add_argument("--home", choices=HOMES, default="djghosh")
    parser.add_argument("--hub", default="https://huggingface.co", help="or a mirror's address")
    parser.add_argument("--list", action="store_true", help="show the rows and what is here")
    args = parser.parse_args(argv)
    rows, failed = choose_rows(args.only), []
    if args.list:
        show(rows, args.target)
        return
    for row in rows:  # one set that fails does not keep the others
        try:
            print(f"{row.title}: complete in {fetch(row, args.target, args.home, args.hub)}")
        except (ValueError, FileNotFoundError) as error:
            failed.append(f"{row.sets[0]} ({error})")
    if failed:
        raise ValueError(f"{len(failed)} of {len(rows)} sets failed: {'; '.join(failed)}")


if __name__ == "__main__":
    run_main(main)
