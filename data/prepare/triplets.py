"""Other judgements -> the CSV of data/triplets.py.

    python -m data.prepare.triplets things TRIPLETS.csv IMAGES.txt OUT.csv    anchor_idx,positive_idx,...
    python -m data.prepare.triplets rdm MATRIX.npy IMAGES.txt OUT.csv         mined from dissimilarities
"""
import csv
import os
import pathlib
from dataclasses import dataclass

import numpy as np

from configs import load_config
from data.log import run_main
from data.triplets import SPLITS, _file, _inside, _need, _number, _table, split_anchors


def convert_things(triplets_csv, images_txt, out_csv, seed):
    """THINGS odd-one-out judgements -> generic CSV; returns the number of triplets a split.

    triplets_csv: columns anchor_idx,positive_idx,negative_idx, the positive being the nearer one.
    images_txt: one path a line, relative to out_csv's folder; line 1 is image 0.
    """
    names = image_list(images_txt, out_csv)
    columns = ("anchor_idx", "positive_idx", "negative_idx")
    table = _table(triplets_csv)
    _need(triplets_csv, next(table), columns)
    found = []
    for number, cells in table:
        where = f"{triplets_csv}, row {number}, "
        indices = []
        for column in columns:
            try:
                index = _number(cells[column], column)
            except ValueError as error:
                raise ValueError(where + str(error)) from None
            if not 0 <= index < len(names):
                raise ValueError(f"{where}column '{column}': {index} is none of the {len(names)} "
                                 f"images of {images_txt}, counted from 0")
            indices.append(index)
        if len(set(indices)) < 3:
            # an image is nearest to itself: such a row teaches nothing, or a wrong thing
            raise ValueError(f"{where}columns {', '.join(columns)}: {indices} repeats an image")
        found.append(indices)
    return write_triplets(out_csv, found, names, seed)


def convert_rdm(matrix_npy, images_txt, out_csv, seed, per_anchor):
    """Triplets mined from a dissimilarity matrix (n,n), as is done with brain data.

    Each image is an anchor `per_anchor` times, without repeating a pair: the positive is drawn from
    its nearest 3 % of the other images, the negative from its farthest 5 %, at least one of each.
    """
    names = image_list(images_txt, out_csv)
    rng = np.random.default_rng([seed, 0])
    found = []
    for anchor, row in enumerate(_matrix(matrix_npy, len(names))):                       # row (n,)
        others = np.argsort(row, kind="stable")  # equal distances: by number, on every machine
        others = others[others != anchor]                                                # (n-1,)
        near = others[:max(1, round(0.03 * len(others)))]
        far = others[-max(1, round(0.05 * len(others))):]
        if row[near[-1]] >= row[far[0]]:
            raise ValueError(f"{matrix_npy}: row {anchor} (from 0): its nearest and its farthest "
                             f"images are equally far ({row[far[0]]}); it says nothing")
        pairs = len(near) * len(far)
        for pair in rng.choice(pairs, size=min(per_anchor, pairs), replace=False):
            found.append([anchor, near[pair // len(far)], far[pair % len(far)]])
    return write_triplets(out_csv, found, names, seed)


def _matrix(matrix_npy, count):
    """A dissimilarity matrix (count, count): finite, symmetric."""
    try:
        matrix = np.load(_file(matrix_npy), allow_pickle=False)
    except ValueError:  # pickled objects are refused unread
        raise ValueError(f"{matrix_npy}: not a NumPy file of numbers") from None
    if matrix.shape != (count, count) or count < 3:
        raise ValueError(f"{matrix_npy}: shape {matrix.shape}; {count} images need "
                         f"({count}, {count}), and at least 3 of them")
    # symmetric within np.isclose: float32 matrices are often written by summing in two orders
    bad = np.argwhere(~np.isfinite(matrix) | ~np.isclose(matrix, matrix.T))
    if len(bad):
        row, column = bad[0]
        raise ValueError(f"{matrix_npy}: entry ({row}, {column}) is {matrix[row, column]} and "
                         f"({column}, {row}) is {matrix[column, row]}: finite and equal is needed")
    return matrix


def image_list(images_txt, out_csv):
    """Paths of a list, one a line, checked to be files inside out_csv's folder."""
    folder = pathlib.Path(out_csv).parent
    names = _file(images_txt).read_text(encoding="utf-8-sig").splitlines()
    for number, name in enumerate(names, 1):
        try:
            _inside(name, "path")
        except ValueError as error:
            raise ValueError(f"{images_txt}, row {number}, {error}") from None
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{images_txt}, row {number}: no file {name!r} in {folder}; "
                                    "OUT.csv must lie where the paths of the list begin")
    return names


def write_triplets(out_csv, found, names, seed):
    """Write (anchor, positive, negative) indices as the generic CSV, all at once or not at all.

    The positive goes left or right by a fair, seeded coin; anchors are split 80/10/10.
    """
    splits = split_anchors([anchor for anchor, _, _ in found], seed)
    counts = {split: splits.count(split) for split in SPLITS}
    if not all(counts.values()):
        raise ValueError(f"{out_csv}: too few anchors to split them in "
                         "train, val and test; at least 3 are needed")
    # Left and right must say nothing: a tower cannot see sides, but other readers of the file may.
    sides = np.random.default_rng([seed, 1]).integers(2, size=len(found))
    partial = pathlib.Path(f"{out_csv}.tmp")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ref", "left", "right", "label", "split"])
        for (anchor, positive, negative), side, split in zip(found, sides, splits):
            left, right = (negative, positive) if side else (positive, negative)
            writer.writerow([names[anchor], names[left], names[right], side, split])
    os.replace(partial, out_csv)
    return counts


@dataclass
class Config:
    seed: int = 0           # of the draws, the sides and the splits
    per_anchor: int = 50    # rdm: triplets of each image


def main(argv=None):
    config, words = load_config(Config, globals(), argv)
    if len(words) != 4 or words[0] not in ("things", "rdm"):
        raise ValueError("write: python -m data.triplets things TRIPLETS.csv IMAGES.txt OUT.csv "
                         "(or: rdm MATRIX.npy IMAGES.txt OUT.csv) [--seed=0]; --help says more")
    if words[0] == "things":
        counts = convert_things(*words[1:], config.seed)
    else:
        counts = convert_rdm(*words[1:], config.seed, config.per_anchor)
    print(f"{words[3]}: " + ", ".join(f"{n:,} {split}" for split, n in counts.items()))


if __name__ == "__main__":
    run_main(main)
