"""Other judgements -> the CSV of data/triplets.py.

    python -m data.prepare.triplets things TRIPLETS IMAGES.txt OUT.csv    odd one out (THINGS)
    python -m data.prepare.triplets rdm MATRIX.npy IMAGES.txt OUT.csv     mined from distances
    python -m data.prepare.triplets list LINES.txt OUT.csv       A B C: A is closer to B than C
    python -m data.prepare.triplets ratings RATINGS.csv OUT.csv  rater,i,j,rating: high is alike
    python -m data.prepare.triplets votes VOTES.csv OUT.csv      ref,a,b,votes_a,votes_b
    python -m data.prepare.triplets mix OUT.csv A.csv B.csv ...  equal shares of several CSVs

TRIPLETS: THINGS' trainset.txt, three numbers a line of which the third is the odd one out; or a
CSV with the columns anchor_idx,positive_idx,negative_idx. IMAGES.txt: one path a line. list,
ratings and votes find pictures by their names, as in --pictures=images/{}.jpg. Paths are
relative to the folder of OUT.csv. Anchors are dealt 80/10/10 to train, val and test; with
--disjoint=True all pictures are, and triplets across splits are left out; --split=test puts
every triplet into test. --most=6000 first draws 6,000 of the triplets. `mix` keeps the splits of
its files, and takes as many triplets of each as the smallest has, split by split; OUT.csv lies
above them all.
"""
import csv
import itertools
import math
import os
import pathlib
from dataclasses import dataclass

import numpy as np

from configs import check_ranges, load_config
from data.log import run_main
from data.triplets import (SIDES, SPLITS, deal_splits, inside_path, need_columns, read_rows,
                           read_table, whole_number)

HEADER = ["ref", "left", "right", "label", "split"]
WORDS = {"things": 4, "rdm": 4, "list": 3, "ratings": 3, "votes": 3}  # of a command but mix


@dataclass
class Config:
    seed: int = 0              # of the draws, the sides and the splits
    disjoint: bool = False     # leave triplets out whose pictures are of different splits
    split: str = ""            # train, val or test: of all triplets; "": anchors are dealt
    most: int = 0              # draw this many of the triplets; 0: take all
    first: int = -1            # things: number of the list's first image, 0 or 1; -1: find out
    similarity: bool = False   # rdm: the matrix holds similarities s, of which 1 - s is taken
    per_anchor: int = 50       # rdm: triplets of each image
    pictures: str = "{}"       # list, ratings, votes: a picture's path, {} being its name
    lead: float = 1.0          # ratings, votes: by how much the near one must be ahead

    def check(self):
        check_ranges(self, first=(-1, 0, 1), split=("", *SPLITS), not_negative=("seed", "most"),
                     positive=("per_anchor", "lead"))


# -------------------------------- readers: a file -> [(anchor, near, far, its row in the file)]


def read_things(path, count, first):
    """THINGS' odd-one-out judgements, as numbers of `count` images from 0.

    Of the pair that goes together in trainset.txt, the first image is the anchor.
    """
    is_csv = "," in read_text(path)
    if is_csv:
        columns = ("anchor_idx", "positive_idx", "negative_idx")
        table = read_columns(path, columns)
    else:
        columns = ("1", "2", "3")
        table = read_words(path, columns)
    rows = []
    for number, cells in table:
        try:
            rows.append([whole_number(cells, column) for column in columns] + [number])
        except ValueError as error:
            raise ValueError(f"{path}, row {number}, {error}") from None
    if not rows:
        raise ValueError(f"{path}: holds no triplets")
    rows = np.array(rows)                                  # (n,4): anchor, near, far, row
    images = rows[:, :3]                                                     # (n,3)
    if first == -1:
        first = 0 if is_csv else first_number(path, images, count)
    outside = np.argwhere((images < first) | (images >= first + count))
    if len(outside):
        triplet, side = outside[0]
        raise ValueError(f"{path}, row {rows[triplet, 3]}, column '{columns[side]}': "
                         f"{images[triplet, side]} is none of the {count} images of the list, "
                         f"counted from {first}")
    images -= first
    return rows.tolist()


def first_number(path, images, count):
    """0 or 1, the number of the first of `count` images. ValueError if they do not tell."""
    low, high = images.min(), images.max()
    if low <= 0:
        return 0
    if high >= count:
        return 1
    raise ValueError(f"{path}: its numbers run from {low} to {high}, and the list has {count} "
                     "images: say by --first=0 or --first=1 where they start")


def mine_matrix(path, count, config):
    """Triplets mined from a dissimilarity matrix (n,n), as is done with brain data.

    Each image is an anchor `per_anchor` times, without repeating a pair: the positive is drawn
    from the nearest 3 % of the other images, the negative from the farthest 5 %, at least one.
    """
    matrix = read_matrix(path, count, config.similarity)
    rng = np.random.default_rng([config.seed, 0])
    found = []
    for anchor, row in enumerate(matrix):                                    # row (n,)
        others = np.argsort(row, kind="stable")  # equal distances: by number, on every machine
        others = others[others != anchor]                                    # (n-1,)
        near = others[:max(1, round(0.03 * len(others)))]
        far = others[-max(1, round(0.05 * len(others))):]
        if row[near[-1]] >= row[far[0]]:
            raise ValueError(f"{path}: row {anchor} (from 0): its nearest and its farthest "
                             f"images are equally far ({row[far[0]]}); it says nothing")
        pairs = len(near) * len(far)
        for pair in rng.choice(pairs, size=min(config.per_anchor, pairs), replace=False):
            found.append((anchor, near[pair // len(far)], far[pair % len(far)], anchor))
    return found


def read_matrix(path, count, similarity):
    """A dissimilarity matrix (count, count): finite, symmetric, 0 on its diagonal."""
    try:
        matrix = np.asarray(np.load(path, allow_pickle=False), float)
    except (ValueError, TypeError, EOFError):  # pickled objects are refused unread
        raise ValueError(f"{path}: not a NumPy file of numbers") from None
    if matrix.shape != (count, count) or count < 3:
        raise ValueError(f"{path}: shape {matrix.shape}; {count} images need "
                         f"({count}, {count}), and at least 3 of them")
    # symmetric within np.isclose: float32 matrices are often written by summing in two orders
    bad = np.argwhere(~np.isfinite(matrix) | ~np.isclose(matrix, matrix.T))
    if len(bad):
        row, column = bad[0]
        raise ValueError(f"{path}: entry ({row}, {column}) is {matrix[row, column]} and "
                         f"({column}, {row}) is {matrix[column, row]}: finite and equal is "
                         "needed")
    if similarity:
        matrix = 1 - matrix
    own = np.abs(matrix.diagonal())  # distance of an image from itself
    if own.max() > 1e-5 * np.abs(matrix).max():  # float32 rounding of sums
        kind = "1 - s" if similarity else "a distance"
        raise ValueError(f"{path}: {kind} must be 0 on the diagonal, is {own.max()} in row "
                         f"{own.argmax()} (from 0); similarities need --similarity=True")
    return matrix


def read_list(path):
    """Lines "A B C": A is closer to B than to C. Names have no spaces in them."""
    found = []
    for number, cells in read_words(path, ("A", "B", "C")):
        found.append((cells["A"], cells["B"], cells["C"], number))
    return found


def read_ratings(path, lead):
    """Ratings of pairs: two by one rater that share a picture and differ by `lead` or more."""
    ratings = {}  # (rater, anchor) -> [(rating, other picture, row), ...]
    for number, cells in read_columns(path, ("rater", "i", "j", "rating")):
        rating = finite(path, number, cells, "rating")
        rater, i, j = cells["rater"], cells["i"], cells["j"]
        if i != j:
            ratings.setdefault((rater, i), []).append((rating, j, number))
            ratings.setdefault((rater, j), []).append((rating, i, number))
    found = []
    for (_, anchor), rated in ratings.items():
        for pair in itertools.combinations(rated, 2):
            (low, far, _), (high, near, number) = sorted(pair)
            if high - low >= lead and near != far:
                found.append((anchor, near, far, number))
    return found


def read_votes(path, lead):
    """Votes for a and b: the side with at least `lead` more of them is the near one."""
    found = []
    for number, cells in read_columns(path, ("ref", "a", "b", "votes_a", "votes_b")):
        votes_a = finite(path, number, cells, "votes_a")
        votes_b = finite(path, number, cells, "votes_b")
        if votes_a - votes_b >= lead:
            found.append((cells["ref"], cells["a"], cells["b"], number))
        if votes_b - votes_a >= lead:
            found.append((cells["ref"], cells["b"], cells["a"], number))
    return found


def read_columns(path, columns):
    """Yields (row number, {column: cell}) of a CSV that has these columns."""
    table = read_table(path)
    need_columns(path, next(table), columns)
    yield from table


def read_words(path, columns):
    """Yields (line number, {column: word}) of a text file; blank lines are left out."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        words = line.split()
        if words and len(words) != len(columns):
            raise ValueError(f"{path}, row {number}: {len(words)} words, where {len(columns)} "
                             "separated by spaces are needed")
        if words:
            yield number, dict(zip(columns, words))


def finite(path, number, cells, column):
    """The number in a cell. ValueError for anything else, infinities and nan too."""
    try:
        value = float(cells[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}, row {number}, column '{column}': {cells[column]!r} must be "
                         "a number")
    return value


def read_text(path):
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text in UTF-8") from None


# ------------------------------------------------------------------------ the one form written


def image_list(images_txt):
    """Paths of a list, one a line; line 1 is the first image."""
    return read_text(images_txt).rstrip().split("\n")


def number_pictures(found, pictures):
    """Readers' names -> (paths of the distinct pictures, triplets of their numbers from 0)."""
    numbers, numbered = {}, []
    for anchor, near, far, row in found:
        triplet = []
        for name in (anchor, near, far):
            path = pictures.replace("{}", name)
            triplet.append(numbers.setdefault(path, len(numbers)))
        numbered.append([*triplet, row])
    return list(numbers), numbered


def write_triplets(out_csv, found, names, source, config):
    """Write triplets as the generic CSV, whole or not at all; returns how many a split has.

    found: [(anchor, near, far, row in source)], numbers of `names`, the pictures' paths.
    The near one goes left or right by a fair, seeded coin.
    """
    check_pictures(out_csv, found, names, source)
    dealt = []
    for anchor, near, far, _ in found:
        dealt += [anchor, near, far] if config.disjoint else [anchor]
    if config.split:
        splits = dict.fromkeys(dealt, config.split)
    else:
        splits = deal_splits(dealt, config.seed)
    # Sides must say nothing: a tower cannot see them, but other readers of the file may.
    sides = np.random.default_rng([config.seed, 1]).integers(2, size=len(found))
    counts = dict.fromkeys(SPLITS, 0)
    lines = []
    for (anchor, near, far, _), side in zip(found, sides):
        split = splits[anchor]
        if config.disjoint and (splits[near] != split or splits[far] != split):
            continue
        left, right = (far, near) if side else (near, far)
        lines.append([names[anchor], names[left], names[right], side, split])
        counts[split] += 1
    if not config.split and not all(counts.values()):
        raise ValueError(f"{out_csv}: too few anchors or pictures to split them in train, val "
                         f"and test: {counts}")
    write_csv(out_csv, lines)
    return counts


def write_csv(out_csv, lines):
    """Write the generic CSV, whole or not at all, and over nothing but such a file."""
    if os.path.exists(out_csv) and not read_text(out_csv).startswith(",".join(HEADER)):
        raise ValueError(f"{out_csv}: is there and not of this command; name another file")
    partial = pathlib.Path(f"{out_csv}.tmp")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *lines])
    os.replace(partial, out_csv)


def mix(out_csv, sources, seed):
    """Equal shares of several CSVs as one, split by split; returns how many a split has.

    The triplets of each are drawn by the seed, and stay in their order.
    """
    folder, splits = pathlib.Path(out_csv).absolute().parent, {split: [] for split in SPLITS}
    for source in sources:
        rows = read_rows(pathlib.Path(source))
        below = os.path.relpath(pathlib.Path(source).absolute().parent, folder)
        if below.startswith(".."):
            raise ValueError(f"{source}: lies outside of {folder}, the folder of {out_csv}")
        for split in SPLITS:
            lines = []
            for row in rows:
                if row["split"] == split:
                    paths = [os.path.normpath(os.path.join(below, row[side])) for side in SIDES]
                    lines.append([*paths, row["label"], split])
            if not lines:
                raise ValueError(f"{source}: has no triplets of split {split}")
            splits[split].append(lines)
    rng, mixed, counts = np.random.default_rng([seed, 2]), [], {}
    for split, files in splits.items():
        share = min(map(len, files))
        for lines in files:
            chosen = np.sort(rng.permutation(len(lines))[:share])
            mixed += [lines[i] for i in chosen]
        counts[split] = share * len(files)
    write_csv(out_csv, mixed)
    return counts


def check_pictures(out_csv, found, names, source):
    """ValueError or FileNotFoundError for a triplet that no one could learn from."""
    folder = pathlib.Path(out_csv).parent
    checked = set()
    for anchor, near, far, row in found:
        if anchor == near or anchor == far or near == far:
            raise ValueError(f"{source}, row {row}: {names[anchor]}, {names[near]}, {names[far]} "
                             "repeats an image")
        for number in (anchor, near, far):
            if number in checked:
                continue
            name = names[number]
            try:
                inside_path({"path": name}, "path")
            except ValueError as error:
                raise ValueError(f"{source}, row {row}, {error}") from None
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{source}, row {row}: no file {name!r} in {folder}; "
                                        "OUT.csv must lie where the pictures' paths begin")
            checked.add(number)


def draw(found, most, seed):
    """`most` of the triplets, drawn by the seed, in their order; all if 0 or if there are fewer."""
    if most == 0:
        return found
    order = np.random.default_rng([seed, 3]).permutation(len(found))
    chosen = np.sort(order[:most])
    return [found[i] for i in chosen]


def convert(words, config):
    """(triplets that a split has, how many were left out) of a command that reads one source."""
    kind, source, out_csv = words[0], words[1], words[-1]
    if kind in ("things", "rdm"):
        names = image_list(words[2])
        if kind == "things":
            found = read_things(source, len(names), config.first)
        else:
            found = mine_matrix(source, len(names), config)
    else:
        if kind == "list":
            found = read_list(source)
        elif kind == "ratings":
            found = read_ratings(source, config.lead)
        else:
            found = read_votes(source, config.lead)
        names, found = number_pictures(found, config.pictures)
    if not found:
        raise ValueError(f"{source}: holds no triplets; --lead={config.lead:g} may be too high")
    found = draw(found, config.most, config.seed)
    counts = write_triplets(out_csv, found, names, source, config)
    return counts, len(found) - sum(counts.values())


def main(argv=None):
    config, words = load_config(Config, globals(), argv)
    if len(words) > 3 and words[0] == "mix":
        out_csv, left_out = words[1], 0
        counts = mix(out_csv, words[2:], config.seed)
    elif words and len(words) == WORDS.get(words[0]):
        out_csv = words[-1]
        counts, left_out = convert(words, config)
    else:
        raise ValueError("write: python -m data.prepare.triplets things TRIPLETS IMAGES.txt "
                         "OUT.csv (or rdm, list, ratings, votes, mix; --help says more)")
    line = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    if left_out:
        line += f"; {left_out:,} left out, whose pictures are of different splits"
    print(f"{out_csv}: {line}")


if __name__ == "__main__":
    run_main(main)
