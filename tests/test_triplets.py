"""data/triplets.py: reading judgements, faults of a file, shares, shuffles; conversions to it."""
import csv
import hashlib
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data import images, log, triplets
from data.prepare import triplets as conversions
from data.order import epoch_order
from data.triplets import Triplets
import evaluate
from evaluate import two_afc

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADER = ("id,left_vote,right_vote,votes,ref_path,left_path,right_path,split,is_imagenet,prompt"
          .split(","))


def picture(path, rng, size=(20, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write(folder, rows, header=HEADER, name="data.csv"):
    with open(folder / name, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder / name


@pytest.fixture
def nights(tmp_path):
    """A folder in NIGHTS' form and its rows: 20 train, 10 val, 10 test; every 5th has 5 votes."""
    rng, rows = np.random.default_rng(0), []
    for i in range(40):
        names = [f"ref/{i}.png", f"distort/{i}_1.png", f"distort/{i}_0.png"]
        for name in names:
            picture(tmp_path / name, rng)
        right = int(rng.integers(2))
        rows.append([i, 1 - right, right, 5 if i % 5 == 0 else 6, *names,
                     ("train", "val", "train", "test")[i % 4], i % 3 == 0, "a, quoted\nprompt"])
    write(tmp_path, rows)
    return tmp_path, rows


# ------------------------------------------------------------------------------------- reading


def test_nights_is_read_as_published(nights):
    folder, rows = nights
    kept = [row for row in rows if row[7] == "train" and row[3] >= 6]
    train = Triplets(folder, "train")
    assert train.labels.tolist() == [row[2] for row in kept]
    assert train.paths.tolist() == [row[4:7] for row in kept]
    assert train.is_imagenet.tolist() == [row[8] for row in kept]


def test_min_votes_decides_what_stays(nights):
    assert len(Triplets(nights[0], "train", min_votes=5)) == 20
    assert len(Triplets(nights[0], "train", min_votes=6)) == 16


def generic(folder, count=30, header=("ref", "left", "right", "label"), **columns):
    """A CSV of `count` triplets on ten anchors; extra columns by name."""
    rng = np.random.default_rng(1)
    for i in range(12):
        picture(folder / f"{i}.png", rng)
    rows = [[f"{i % 10}.png", "10.png", "11.png", i % 2] for i in range(count)]
    for values in columns.values():
        rows = [row + [value] for row, value in zip(rows, values)]
    return write(folder, rows, [*header, *columns], "mine.csv"), rows


def test_generic_csv_without_splits_never_shares_an_anchor(tmp_path):
    path, rows = generic(tmp_path)
    anchors = [set(Triplets(path, split).paths[:, 0]) for split in ("train", "val", "test")]
    assert [len(a) for a in anchors] == [8, 1, 1]
    assert len(set.union(*anchors)) == 10


def test_dealt_splits_are_those_of_earlier_versions():
    """Whatever the order of the rows, and of a set in this process."""
    splits = triplets.deal_splits("zyxwvutsrqponmlkjihgfedcba3210", seed=0)
    assert "".join(name for name in sorted(splits) if splits[name] == "val") == "2hw"
    assert "".join(name for name in sorted(splits) if splits[name] == "test") == "agr"


def test_generic_csv_may_bring_splits_and_votes(tmp_path):
    splits, votes = ["train", "val", "test"] * 10, [6.0] * 15 + [2] * 15
    path, rows = generic(tmp_path, split=splits, votes=votes)
    assert len(Triplets(path, "val")) == 5
    assert Triplets(path, "val").labels.tolist() == [row[3] for row in rows[1:15:3]]
    assert Triplets(path, "val").is_imagenet is None


def test_images_are_squashed_in_the_order_of_the_columns(nights):
    train = Triplets(nights[0], "train")
    loaded = train.load(8, rows=[3, 1])
    assert loaded.shape == (2, 3, 3, 8, 8) and loaded.dtype == torch.uint8
    for i, row in enumerate((3, 1)):
        for j, name in enumerate(train.paths[row]):
            with Image.open(nights[0] / name) as whole:
                small = np.array(whole.convert("RGB").resize((8, 8), Image.Resampling.BICUBIC))
            assert np.array_equal(loaded[i, j].permute(1, 2, 0), small)


def test_an_image_that_triplets_share_is_decoded_once_and_stands_in_each(tmp_path, monkeypatch):
    path, rows = generic(tmp_path)
    for row in rows[::2]:
        row[1:3] = reversed(row[1:3])
    write(tmp_path, rows, ["ref", "left", "right", "label"], "mine.csv")
    train, decode, decoded = Triplets(path, "train"), images.decode, []

    def count(data):
        decoded.append(data)
        return decode(data)
    monkeypatch.setattr(images, "decode", count)
    loaded = train.load(8)
    assert len(decoded) == len(set(train.paths.ravel())) < 3 * len(train)
    for i, names in enumerate(train.paths):
        for j, name in enumerate(names):
            alone = images.squash_image(decode((tmp_path / name).read_bytes()), 8)
            assert torch.equal(loaded[i, j], alone)


def test_kept_images_are_the_decoded_ones(nights):
    decoded, kept = Triplets(nights[0], "train"), Triplets(nights[0], "train")
    kept.keep(8)
    assert torch.equal(kept.load(8, [5, 0]), decoded.load(8, [5, 0]))


def test_shares_and_shuffles_use_the_images_kept_already(nights, monkeypatch):
    Triplets(nights[0], "train").keep(8)
    monkeypatch.setattr(images, "decode", None)  # decoding again would fail
    half = Triplets(nights[0], "train", fraction=0.5, shuffle_votes=True)
    half.keep(8)
    assert half.load(8).shape == (8, 3, 3, 8, 8)


def test_a_changed_image_is_decoded_anew(nights):
    before = Triplets(nights[0], "train")
    before.keep(8)
    picture(nights[0] / before.paths[0, 0], np.random.default_rng(9), size=(30, 30))
    after = Triplets(nights[0], "train")
    after.keep(8)
    assert not torch.equal(after.load(8, [0]), before.load(8, [0]))
    assert after.fingerprint != before.fingerprint


def test_a_changed_image_of_the_same_size_in_bytes_is_decoded_anew(nights):
    name = nights[0] / Triplets(nights[0], "train").paths[0, 0]
    for value in (0, 255):
        Image.new("RGB", (8, 8), (value,) * 3).save(name, "BMP")
        os.utime(name, ns=(value, value))
        train = Triplets(nights[0], "train")
        train.keep(8)
        assert (train.load(8, [0])[0, 0] == value).all()


def test_a_bad_image_is_named_and_nothing_half_decoded_stays(nights):
    train = Triplets(nights[0], "train")
    (nights[0] / train.paths[2, 1]).write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"row \d+, column 'left_path': distort/.*not an image"):
        train.keep(8)
    assert list((nights[0] / "index").iterdir()) == []


def test_without_room_for_the_decoded_images_one_line_says_so(nights, monkeypatch):
    monkeypatch.setattr(triplets.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match="decoded images need 0.00 GB, 0.00 GB are free"):
        Triplets(nights[0], "train").keep(8)


def test_images_of_a_folder_that_cannot_be_written_are_kept_in_the_cache(nights, tmp_path,
                                                                         monkeypatch, capsys):
    """A file called index refuses everyone, root too, as a read-only folder does."""
    (nights[0] / "index").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    decoded, kept = Triplets(nights[0], "train"), Triplets(nights[0], "train")
    kept.keep(8)
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f"{nights[0]}: ") and "XDG_CACHE_HOME" in said
    assert torch.equal(kept.load(8, [5, 0]), decoded.load(8, [5, 0]))
    assert len(list((tmp_path / "cache").rglob("images_8_*.npy"))) == 1
    monkeypatch.setattr(images, "decode", None)  # decoding again would fail
    Triplets(nights[0], "train").keep(8)


def test_each_read_only_folder_has_a_cache_of_its_own(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(30, "Read-only file system")
    monkeypatch.setattr(log.tempfile, "TemporaryFile", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    folders = [log.index_folder(tmp_path / name) for name in ("a", "b", "a")]
    assert folders[0] == folders[2] != folders[1]
    assert all(folder.parent == tmp_path / "cache/perceptual-init" for folder in folders)


def test_kept_images_are_read_where_they_are_though_nothing_can_be_written(nights, monkeypatch):
    Triplets(nights[0], "train").keep(8)
    monkeypatch.setattr(triplets, "index_folder", None)  # asking for a place would fail
    Triplets(nights[0], "train").keep(8)


def test_without_any_place_for_decoded_images_one_line_says_what_to_set(nights, monkeypatch,
                                                                        capsys):
    (nights[0] / "index").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(nights[0] / "index"))
    with pytest.raises(NotADirectoryError):
        Triplets(nights[0], "train").keep(8)
    assert "set XDG_CACHE_HOME" in capsys.readouterr().out


def test_fingerprints_are_those_of_earlier_versions(tmp_path, monkeypatch):
    """Checkpoints and decoded files of before are recognised: sha256 of the lists' repr."""
    for name, size in (("a.png", 1), ("b.png", 22), ("c.png", 333)):
        (tmp_path / name).write_bytes(b"x" * size)
    path = write(tmp_path, [["a.png", "b.png", "c.png", 1, "train"],
                            ["b.png", "c.png", "a.png", 0, "train"]],
                 ["ref", "left", "right", "label", "split"], "mine.csv")
    text = "[[['a.png', 'b.png', 'c.png'], ['b.png', 'c.png', 'a.png']], " \
           "[1, 22, 333, 22, 333, 1], [1, 0]]"
    assert Triplets(path, "train").fingerprint == hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------- shares and shuffles


def test_fractions_are_nested_and_seeded(nights):
    shares = [set(Triplets(nights[0], "train", fraction=f, seed=3).paths[:, 0])
              for f in (0.1, 0.25, 0.5, 0.75, 1.0)]
    assert [len(share) for share in shares] == [2, 4, 8, 12, 16]
    assert all(small < large for small, large in zip(shares, shares[1:]))
    assert shares[2] != set(Triplets(nights[0], "train", fraction=0.5, seed=4).paths[:, 0])


def test_shuffling_permutes_the_votes_and_nothing_else(nights):
    plain = Triplets(nights[0], "train")
    shuffled = [Triplets(nights[0], "train", shuffle_votes=True, seed=seed) for seed in range(6)]
    for other in shuffled:
        assert np.array_equal(other.paths, plain.paths)
        assert sorted(other.labels) == sorted(plain.labels)
    assert any(not np.array_equal(other.labels, plain.labels) for other in shuffled)


def test_shuffled_votes_follow_the_seed(nights):
    votes = {tuple(Triplets(nights[0], "train", shuffle_votes=True, seed=seed).labels)
             for seed in range(6)}
    assert len(votes) > 1


def test_an_epoch_s_order_follows_the_seed_of_the_run(nights):
    train = Triplets(nights[0], "train")
    config = SimpleNamespace(seed=3, batch_size=16, image_size=8)
    samples, _, _ = train.batch(1, config)
    assert (samples[:, 0] // 3).tolist() == epoch_order(3, 1, 16).tolist()


@pytest.mark.parametrize("settings", [{"fraction": 0.5}, {"shuffle_votes": True}])
@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_votes_can_be_neither_shared_nor_shuffled(nights, split, settings):
    with pytest.raises(ValueError, match="are for split 'train'"):
        Triplets(nights[0], split, **settings)


def test_batches_are_a_permutation_an_epoch_whatever_came_before(nights):
    train = Triplets(nights[0], "train")
    config = SimpleNamespace(seed=1, batch_size=5, image_size=8)
    drawn = [train.batch(step, config) for step in (4, 0, 1, 2, 3)]  # 16 triplets: 3 steps an epoch
    rows = [(samples[:, 0] // 3).tolist() for samples, _, _ in drawn]
    first, second = rows[1] + rows[2] + rows[3], rows[4] + rows[0]
    assert len(first) == len(set(first)) == 15 and len(second) == len(set(second)) == 10
    assert first[:10] != second
    samples, pixels, labels = train.batch(4, config)
    assert torch.equal(pixels, train.load(8, rows[0]))
    assert labels.tolist() == train.labels[rows[0]].tolist()
    assert samples.tolist() == [[3 * row, 3 * row + 1, 3 * row + 2] for row in rows[0]]


# -------------------------------------------------------------------------------------- scores


def unit(*degrees):
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_2afc_counts_by_hand():
    ref, left, right = unit(0, 0, 0, 0), unit(10, 10, 50, 50), unit(20, 20, 40, 40)
    labels = torch.tensor([0, 1, 0, 1])  # left is nearer twice, then right
    assert two_afc(ref, left, right, labels).tolist() == [1, 0, 0, 1]


def test_a_tie_counts_half():
    ref, left = unit(0, 0), unit(30, 30)
    assert two_afc(ref, left, left.clone(), torch.tensor([0, 1])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("side", [0, 1])
def test_votes_all_for_one_side_score_what_that_side_gets(side):
    ref, left, right = unit(0, 0, 0), unit(10, 50, 10), unit(30, 30, 30)
    scores = two_afc(ref, left, right, torch.full((3,), side))
    assert scores.mean().item() == pytest.approx([2 / 3, 1 / 3][side])


def test_bfloat16_embeddings_are_compared_in_float32():
    torch.manual_seed(0)
    ref, left, right = (F.normalize(torch.randn(3000, 32), dim=1).bfloat16() for _ in range(3))
    left[:, 1:] = right[:, 1:]  # near ties: the sides differ in one of 32 numbers
    lead = ((ref * right).sum(1) - (ref * left).sum(1)).float()  # what must not happen
    assert (lead == 0).sum() > 50
    exact = (ref.double() * right.double()).sum(1) - (ref.double() * left.double()).sum(1)
    clear = exact.abs() > 1e-6  # what float32 sums of 32 products can round
    assert (clear & (lead == 0)).sum() > 50
    assert two_afc(ref, left, right, (exact > 0).long())[clear].eq(1).all()


def test_embeddings_of_a_split_are_unit_float32_in_order(nights):
    train = Triplets(nights[0], "train")

    def encode(pixels):  # of any length and type
        return pixels.mean((2, 3)).double() * 7
    sides = evaluate.embed_triplets(encode, train, 8, "cpu", batch_size=5)
    expected = F.normalize(images.normalise(train.load(8).flatten(0, 1)).mean((2, 3)), dim=1)
    expected = expected.unflatten(0, (-1, 3))
    for j in range(3):
        assert sides[j].dtype == torch.float32
        assert torch.allclose(sides[j], expected[:, j], atol=1e-6)  # fp32 rounding of a mean


# -------------------------------------------------------------------------------------- faults


FAULTS = {  # (column, row as a spreadsheet counts, value): what the line says
    ("votes", 4, "many"): "row 4, column 'votes': 'many' must be a whole number",
    ("votes", 4, "nan"): "row 4, column 'votes': 'nan' must be a whole number",
    ("votes", 4, "inf"): "row 4, column 'votes': 'inf' must be a whole number",
    ("votes", 4, "5.5"): "row 4, column 'votes': '5.5' must be a whole number",
    ("right_vote", 7, "2"): "row 7, column 'right_vote': '2' must be 0 or 1",
    ("right_vote", 7, ""): "row 7, column 'right_vote': '' must be 0 or 1",
    ("split", 3, "dev"): "row 3, column 'split': 'dev' is none of train, val, test",
    ("is_imagenet", 9, "maybe"): "row 9, column 'is_imagenet': 'maybe' is neither True nor False",
    ("id", 12, "3"): "row 12, column 'id': '3' is already in row 5",
    ("ref_path", 4, "gone.png"): "row 4, column 'ref_path': no file 'gone.png'",
    ("left_path", 4, "ref"): "row 4, column 'left_path': no file 'ref'",
    ("right_path", 2, ""): "row 2, column 'right_path': '' must be a path relative",
    ("right_path", 2, "/etc/passwd"): "row 2, column 'right_path': '/etc/passwd' must be a path",
    ("right_path", 2, "a/../../b.png"): "row 2, column 'right_path': 'a/../../b.png' must be",
    ("right_path", 2, "a\0b"): r"row 2, column 'right_path': 'a\x00b' must be a path",
}


@pytest.mark.parametrize("fault, message", FAULTS.items(), ids=map(repr, FAULTS))
def test_a_faulty_cell_gives_one_line_with_row_and_column(nights, fault, message):
    (column, number, value), (folder, rows) = fault, nights
    rows[number - 2][HEADER.index(column)] = value
    write(folder, rows)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        Triplets(folder, "train")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "data.csv" in str(caught.value)


def test_votes_that_contradict_each_other_are_refused(nights):
    folder, rows = nights
    rows[1][1] = rows[1][2] = 1
    write(folder, rows)
    with pytest.raises(ValueError, match="row 3, column 'left_vote': '1' must be 0"):
        Triplets(folder, "train")


@pytest.mark.parametrize("label", ["2", "-1", "left", "0.5", ""])
def test_a_label_other_than_0_or_1_is_refused(tmp_path, label):
    path, rows = generic(tmp_path)
    rows[4][3] = label
    write(tmp_path, rows, ["ref", "left", "right", "label"], "mine.csv")
    with pytest.raises(ValueError, match=f"mine.csv, row 6, column 'label': '{label}' must be 0"):
        Triplets(path, "train")


@pytest.mark.parametrize("column", sorted(set(HEADER) - {"prompt"}))
def test_a_missing_column_is_named(nights, column):
    folder, rows = nights
    place = HEADER.index(column)
    write(folder, [row[:place] + row[place + 1:] for row in rows],
          HEADER[:place] + HEADER[place + 1:])
    missing = "'ref'" if column == "ref_path" else f"'{column}'"  # then it reads as the generic CSV
    with pytest.raises(ValueError, match=f"row 1, column {missing}: found 0 times, needed once"):
        Triplets(folder, "train")


def test_a_column_given_twice_is_named(tmp_path):
    path, rows = generic(tmp_path, header=("ref", "left", "left", "label"))
    with pytest.raises(ValueError, match="row 1, column 'left': found 2 times"):
        Triplets(path, "train")


def test_a_short_row_is_named(nights):
    with open(nights[0] / "data.csv", "a") as file:
        file.write("40,1,0\n")
    with pytest.raises(ValueError, match="row 42, column 4: 3 cells where the header has 10"):
        Triplets(nights[0], "train")


def test_a_split_without_rows_is_named(nights):
    folder, rows = nights
    write(folder, [row for row in rows if row[7] != "val"])
    with pytest.raises(ValueError, match="no row has split 'val' and at least 6 votes"):
        Triplets(folder, "val")


@pytest.mark.parametrize("content, message", [
    (b"", "column 'ref': found 0 times.* the columns are none"),
    (b"ref,left,right,label\n\xff\xfe,b,c,0\n", "not a readable CSV in UTF-8")])
def test_a_file_that_is_no_csv_is_refused(tmp_path, content, message):
    (tmp_path / "mine.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Triplets(tmp_path / "mine.csv", "train")


def test_a_missing_file_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="data.csv: no such file; give a NIGHTS folder"):
        Triplets(tmp_path, "train")


# --------------------------------------------------------------------------------- conversions


def listed(folder, count):
    """`count` pictures and the list of them."""
    rng = np.random.default_rng(2)
    for i in range(count):
        picture(folder / f"images/{i}.png", rng, size=(4, 4))
    (folder / "list.txt").write_text("".join(f"images/{i}.png\n" for i in range(count)))
    return folder / "list.txt"


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def things(folder, found, header="anchor_idx,positive_idx,negative_idx"):
    (folder / "t.csv").write_text("\n".join([header, *(",".join(map(str, f)) for f in found)]))
    return folder / "t.csv"


def convert(*arguments):
    """The command in this process."""
    conversions.main([str(argument) for argument in arguments])


def near_and_far(row):
    return (row["right"], row["left"]) if row["label"] == "1" else (row["left"], row["right"])


def numbered(rows):
    """(anchor, near, far) of each row as numbers of the list's images."""
    found = []
    for row in rows:
        names = (row["ref"], *near_and_far(row))
        found.append([int(pathlib.Path(name).stem) for name in names])
    return found


def test_things_keep_who_is_nearer(tmp_path):
    rng = np.random.default_rng(3)
    found = [rng.choice(30, 3, replace=False).tolist() for _ in range(400)]
    out = tmp_path / "out.csv"
    convert("things", things(tmp_path, found), listed(tmp_path, 30), out)
    rows = read(out)
    assert numbered(rows) == found
    # fair coin, 400 throws: 3 standard deviations are 30
    assert abs(sum(int(row["label"]) for row in rows) - 200) <= 30


def published(folder, found):
    """trainset.txt: three numbers a line, the third is the odd one out."""
    (folder / "trainset.txt").write_text("".join(f"{a} {b} {c}\n" for a, b, c in found))
    return folder / "trainset.txt"


@pytest.mark.parametrize("first", [0, 1])
def test_things_are_read_as_published_wherever_counting_starts(tmp_path, first):
    """The last image is named, and the first: what they are called tells 0 from 1."""
    rng = np.random.default_rng(3)
    found = [rng.choice(30, 3, replace=False).tolist() for _ in range(400)]
    text = published(tmp_path, np.array(found) + first)
    convert("things", text, listed(tmp_path, 30), tmp_path / "out.csv")
    assert numbered(read(tmp_path / "out.csv")) == found


def test_where_things_start_counting_is_asked_for_if_the_numbers_do_not_tell(tmp_path):
    text, names, out = published(tmp_path, [[1, 2, 3]] * 9), listed(tmp_path, 4), tmp_path / "o.csv"
    with pytest.raises(ValueError, match="run from 1 to 3, and the list has 4 images: say by --fi"):
        convert("things", text, names, out)
    found = published(tmp_path, [[1 + i % 4, 1 + (i + 1) % 4, 1 + (i + 2) % 4] for i in range(9)])
    for first in (0, 1):
        convert("things", found, listed(tmp_path, 6), out, f"--first={first}")
        assert numbered(read(out))[0] == [1 - first, 2 - first, 3 - first]


@pytest.mark.parametrize("found, message", [
    ([[0, 1, 5]], "row 1, column '3': 5 is none of the 5 images of the list, counted from 0"),
    ([[1, 2, 3], [1, 6, 2]], "row 2, column '2': 6 is none of the 5 images .* counted from 1"),
    ([[0, 1, "x"]], "row 1, column '3': 'x' must be a whole number"),
    ([[0, 1, "2 3"]], "row 1: 4 words, where 3 separated by spaces are needed"),
    ([[0, 1, 1]], r"row 1: .* repeats an image")])
def test_faults_of_published_things_are_named(tmp_path, found, message):
    with pytest.raises(ValueError, match=message):
        convert("things", published(tmp_path, found), listed(tmp_path, 5), tmp_path / "out.csv")


def test_converted_triplets_are_read_with_no_anchor_in_two_splits(tmp_path, capsys):
    found = [[i % 20, (i + 1) % 20, (i + 2) % 20] for i in range(200)]
    out = tmp_path / "out.csv"
    convert("things", things(tmp_path, found), listed(tmp_path, 20), out)
    assert capsys.readouterr().out == f"{out}: 160 train, 20 val, 20 test\n"
    splits = [Triplets(out, split) for split in ("train", "val", "test")]
    anchors = [set(split.paths[:, 0]) for split in splits]
    assert [len(split) for split in splits] == [160, 20, 20]
    assert [len(a) for a in anchors] == [16, 2, 2] and len(set.union(*anchors)) == 20


def test_disjoint_splits_share_no_picture_and_say_what_they_left_out(tmp_path, capsys):
    rng = np.random.default_rng(5)
    found = [rng.choice(40, 3, replace=False).tolist() for _ in range(4000)]
    out = tmp_path / "out.csv"
    convert("things", things(tmp_path, found), listed(tmp_path, 40), out, "--disjoint=True")
    splits = [Triplets(out, split) for split in ("train", "val", "test")]
    pictures = [set(split.paths.ravel()) for split in splits]
    assert sum(len(names) for names in pictures) == len(set.union(*pictures))
    left_out = 4000 - sum(len(split) for split in splits)
    said = capsys.readouterr().out
    assert f"; {left_out:,} left out, whose pictures are of different splits" in said


def distances(count):
    """Images on a line at places that are no one's tie."""
    place = np.sort(np.random.default_rng(4).random(count))
    return np.abs(place[:, None] - place)


def test_mined_triplets_are_nearest_and_farthest_by_hand(tmp_path):
    matrix = distances(101)
    np.save(tmp_path / "m.npy", matrix)
    out = tmp_path / "out.csv"
    convert("rdm", tmp_path / "m.npy", listed(tmp_path, 101), out, "--per_anchor=14")
    pairs = {}
    for anchor, near, far in numbered(read(out)):
        pairs.setdefault(anchor, []).append((near, far))
    for anchor, drawn in pairs.items():  # of 100 others: the nearest 3 and the farthest 5
        ranks = np.argsort(np.delete(matrix[anchor], anchor))
        others = np.delete(np.arange(101), anchor)[ranks]
        assert len(drawn) == 14 == len(set(drawn))
        assert {near for near, _ in drawn} <= set(others[:3])
        assert {far for _, far in drawn} <= set(others[-5:])
    assert len(pairs) == 101


def test_mining_draws_fifty_an_anchor_and_splits_by_anchor(tmp_path):
    np.save(tmp_path / "m.npy", distances(300))  # 9 x 15 pairs an anchor
    out = tmp_path / "out.csv"
    convert("rdm", tmp_path / "m.npy", listed(tmp_path, 300), out)
    rows = read(out)
    split = {}
    for row in rows:
        split.setdefault(row["ref"], []).append(row["split"])
    assert all(len(of) == 50 and len(set(of)) == 1 for of in split.values())
    of_anchor = [of[0] for of in split.values()]
    assert [of_anchor.count(name) for name in ("train", "val", "test")] == [240, 30, 30]


def test_a_conversion_is_the_same_for_the_same_seed_only(tmp_path):
    np.save(tmp_path / "m.npy", distances(40))
    texts = []
    for seed in (0, 0, 1):
        convert("rdm", tmp_path / "m.npy", listed(tmp_path, 40), tmp_path / "o.csv",
                f"--seed={seed}", "--per_anchor=5")
        texts.append((tmp_path / "o.csv").read_text())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("found, header, message", [
    ([[0, 1, 9]], "anchor_idx,positive_idx,negative_idx",
     "row 2, column 'negative_idx': 9 is none of the 5 images"),
    ([[0, 1, 2], [0, -1, 2]], "anchor_idx,positive_idx,negative_idx",
     "row 3, column 'positive_idx': -1 is none of"),
    ([[0, 1, "x"]], "anchor_idx,positive_idx,negative_idx",
     "row 2, column 'negative_idx': 'x' must be a whole number"),
    ([[0, 1, 1]], "anchor_idx,positive_idx,negative_idx", "row 2: .* repeats an image"),
    ([[0, 1, 2]], "anchor,positive_idx,negative_idx", "row 1, column 'anchor_idx': found 0 times"),
    ([[0, 1, 2], [1, 2, 0]], "anchor_idx,positive_idx,negative_idx", "too few anchors")])
def test_faults_of_things_files_are_named(tmp_path, found, header, message):
    with pytest.raises(ValueError, match=message):
        convert("things", things(tmp_path, found, header), listed(tmp_path, 5),
                tmp_path / "out.csv")
    assert not list(tmp_path.glob("out*"))


def test_an_image_list_must_name_files_beside_the_csv(tmp_path):
    path, found = listed(tmp_path, 5), things(tmp_path, [[0, 1, 2], [1, 2, 3], [2, 3, 4]])
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(FileNotFoundError, match="t.csv, row 2: no file 'images/0.png' in .*elsew"):
        convert("things", found, path, tmp_path / "elsewhere/out.csv")
    path.write_text("images/0.png\n../secret.png\nimages/2.png\n" * 2)
    with pytest.raises(ValueError, match="row 2, column 'path': '../secret.png' must be"):
        convert("things", found, path, tmp_path / "out.csv")


def changed(entry, value):
    matrix = distances(10)
    matrix[entry] = value
    return matrix


@pytest.mark.parametrize("matrix, message", [
    (distances(9), r"shape \(9, 9\); 10 images need \(10, 10\)"),
    (changed((2, 3), 9.0), r"entry \(2, 3\) is 9.0 and \(3, 2\) is 0"),
    (changed((4, 4), np.nan), r"entry \(4, 4\) is nan"),
    (np.ones((10, 10)) - np.eye(10),
     r"row 0 \(from 0\): its nearest and its farthest images are equally far")])
def test_faults_of_a_matrix_are_named(tmp_path, matrix, message):
    np.save(tmp_path / "m.npy", matrix)
    with pytest.raises(ValueError, match=message):
        convert("rdm", tmp_path / "m.npy", listed(tmp_path, 10), tmp_path / "out.csv")


def test_similarities_are_refused_as_distances_and_read_when_named(tmp_path):
    """Taken for distances, every triplet would be upside down."""
    names, out = listed(tmp_path, 40), tmp_path / "out.csv"
    np.save(tmp_path / "d.npy", distances(40))
    np.save(tmp_path / "s.npy", 1 - distances(40))
    with pytest.raises(ValueError, match="must be 0 on the diagonal, is 1.0 in row 0"):
        convert("rdm", tmp_path / "s.npy", names, out)
    with pytest.raises(ValueError, match="1 - s must be 0 on the diagonal, is 1.0"):
        convert("rdm", tmp_path / "d.npy", names, out, "--similarity=True")
    convert("rdm", tmp_path / "d.npy", names, out)
    expected = out.read_text()
    convert("rdm", tmp_path / "s.npy", names, out, "--similarity=True")
    assert out.read_text() == expected


def test_a_diagonal_that_is_0_but_for_rounding_is_read(tmp_path):
    matrix = (distances(40) + 3e-7 * np.eye(40)).astype(np.float32)
    np.save(tmp_path / "m.npy", matrix)
    convert("rdm", tmp_path / "m.npy", listed(tmp_path, 40), tmp_path / "out.csv")


def test_a_pickled_matrix_is_never_opened(tmp_path):
    np.save(tmp_path / "m.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="m.npy: not a NumPy file of numbers"):
        convert("rdm", tmp_path / "m.npy", listed(tmp_path, 10), tmp_path / "out.csv")


def test_a_list_names_the_near_one_first(tmp_path):
    listed(tmp_path, 9)
    found = [[i, (i + 1) % 9, (i + 2) % 9] for i in range(9)]
    lines = [f"{a} {b} {c}\n" for a, b, c in found]
    (tmp_path / "l.txt").write_text("".join(lines) + "\n")
    convert("list", tmp_path / "l.txt", tmp_path / "out.csv", "--pictures=images/{}.png")
    assert numbered(read(tmp_path / "out.csv")) == found


def test_a_list_of_paths_needs_no_pattern(tmp_path):
    listed(tmp_path, 4)
    lines = [f"images/{i}.png images/{(i + 1) % 4}.png images/{(i + 2) % 4}.png" for i in range(4)]
    (tmp_path / "l.txt").write_text("\n".join(lines))
    convert("list", tmp_path / "l.txt", tmp_path / "out.csv")
    assert numbered(read(tmp_path / "out.csv"))[3] == [3, 0, 1]


def test_ratings_of_one_rater_that_differ_enough_make_triplets(tmp_path):
    """By hand: anna's pairs share a picture; ben's rating is not compared with hers."""
    listed(tmp_path, 5)
    rows = [["anna", 0, 1, 9], ["anna", 0, 2, 4], ["anna", 3, 0, 5.5], ["anna", 1, 2, 8],
            ["ben", 0, 4, 1], ["ben", 3, 1, 1], ["ben", 3, 2, 6], ["anna", 0, 0, 1]]
    write(tmp_path, rows, ["rater", "i", "j", "rating"], "r.csv")
    convert("ratings", tmp_path / "r.csv", tmp_path / "out.csv", "--pictures=images/{}.png",
            "--lead=3.5")
    # 0: 1 (9) over 2 (4) and over 3 (5.5); 1: 9 and 8; 2: 1 (8) over 0 (4); 3, by ben: 2 over 1
    assert sorted(numbered(read(tmp_path / "out.csv"))) == [[0, 1, 2], [0, 1, 3], [2, 1, 0],
                                                            [3, 2, 1]]


def test_the_side_with_more_votes_is_near_and_ties_are_left_out(tmp_path):
    listed(tmp_path, 5)
    rows = [[0, 1, 2, 5, 1], [1, 2, 3, 0, 2], [2, 3, 4, 3, 3], [3, 4, 0, 2, 1], [4, 0, 1, 1, 4]]
    path = write(tmp_path, rows, ["ref", "a", "b", "votes_a", "votes_b"], "v.csv")
    for lead, expected in ((1, [[0, 1, 2], [1, 3, 2], [3, 4, 0], [4, 1, 0]]),
                           (2, [[0, 1, 2], [1, 3, 2], [4, 1, 0]])):
        convert("votes", path, tmp_path / "out.csv", "--pictures=images/{}.png", f"--lead={lead}")
        assert numbered(read(tmp_path / "out.csv")) == expected


def test_all_triplets_can_be_of_one_split(tmp_path):
    listed(tmp_path, 3)
    (tmp_path / "l.txt").write_text("0 1 2\n1 2 0\n")
    convert("list", tmp_path / "l.txt", tmp_path / "out.csv", "--pictures=images/{}.png",
            "--split=val")
    assert [row["split"] for row in read(tmp_path / "out.csv")] == ["val", "val"]


def test_a_draw_is_of_so_many_distinct_triplets_in_their_order_by_the_seed(tmp_path):
    listed(tmp_path, 40)
    found = [[i, (i + 1) % 40, (i + 2) % 40] for i in range(40)]
    lines = [f"{a} {b} {c}\n" for a, b, c in found]
    (tmp_path / "l.txt").write_text("".join(lines))
    drawn = []
    for options in (["--most=15"], ["--most=15", "--seed=1"], ["--most=41"]):
        convert("list", tmp_path / "l.txt", tmp_path / "out.csv", "--pictures=images/{}.png",
                "--split=test", *options)
        drawn.append(numbered(read(tmp_path / "out.csv")))
    assert len(drawn[0]) == len(drawn[1]) == 15
    assert drawn[0] != drawn[1]
    assert drawn[0] == [triplet for triplet in found if triplet in drawn[0]]
    assert drawn[2] == found


def test_a_lead_that_no_triplet_has_is_said(tmp_path):
    listed(tmp_path, 3)
    path = write(tmp_path, [[0, 1, 2, 3, 1]], ["ref", "a", "b", "votes_a", "votes_b"], "v.csv")
    with pytest.raises(ValueError, match="v.csv: holds no triplets; --lead=4 may be too high"):
        convert("votes", path, tmp_path / "out.csv", "--pictures=images/{}.png", "--lead=4")


def test_a_file_of_the_users_is_not_written_over(tmp_path):
    found = things(tmp_path, [[i, (i + 1) % 5, (i + 2) % 5] for i in range(5)])
    (tmp_path / "out.csv").write_text("mine\n")
    with pytest.raises(ValueError, match="out.csv: is there and not of this command"):
        convert("things", found, listed(tmp_path, 5), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "mine\n"


def test_text_that_is_no_utf_8_names_its_file(tmp_path):
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe0 1 2")
    for kind, lists in (("things", [listed(tmp_path, 3)]), ("list", [])):
        with pytest.raises(ValueError, match="l.txt: not text in UTF-8"):
            convert(kind, tmp_path / "l.txt", *lists, tmp_path / "out.csv")


@pytest.mark.parametrize("kind, content, message", [
    ("list", "0 1 2\n0 1\n", "s.txt, row 2: 2 words, where 3 separated by spaces are needed"),
    ("list", "0 1 7\n", "s.txt, row 1: no file 'images/7.png' in"),
    ("list", "0 1 ../x\n", "s.txt, row 1, column 'path': 'images/../x.png' must be a path"),
    ("list", "", "s.txt: holds no triplets"),
    ("ratings", "rater,i,j\na,0,1\n", "row 1, column 'rating': found 0 times"),
    ("ratings", "rater,i,j,rating\na,0,1,high\n", "row 2, column 'rating': 'high' must be a num"),
    ("votes", "ref,a,b,votes_a,votes_b\n0,1,2,3,nan\n", "row 2, column 'votes_b': 'nan' must be"),
    ("votes", "ref,a,b,votes_a,votes_b\n0,1,1,3,0\n", "row 2: .* repeats an image")])
def test_faults_of_lists_ratings_and_votes_are_named(tmp_path, kind, content, message):
    listed(tmp_path, 5)
    (tmp_path / "s.txt").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(kind, tmp_path / "s.txt", tmp_path / "out.csv", "--pictures=images/{}.png")
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def two_sets(tmp_path):
    """CSVs a/t.csv with 6, 2 and 2 triplets of the three splits, b/t.csv with 4, 3 and 1."""
    sizes = {"a": (6, 2, 2), "b": (4, 3, 1)}
    for name, counts in sizes.items():
        folder = tmp_path / name
        folder.mkdir()
        listed(folder, 8)
        rows = []
        for split, count in zip(("train", "val", "test"), counts):
            for i in range(count):
                paths = [f"images/{(i + j) % 8}.png" for j in range(3)]
                rows.append([*paths, (i + len(name)) % 2, split])
        write(folder, rows, ["ref", "left", "right", "label", "split"], "t.csv")
    return tmp_path


def test_a_mix_has_equal_shares_of_each_split_and_only_rows_of_its_files(two_sets, capsys):
    conversions.main(["mix", f"{two_sets}/mix.csv", f"{two_sets}/a/t.csv", f"{two_sets}/b/t.csv"])
    mixed = read(two_sets / "mix.csv")
    counts = {}
    for row in mixed:
        key = row["ref"][0], row["split"]
        counts[key] = counts.get(key, 0) + 1
        assert len({row[side].split("/")[0] for side in ("ref", "left", "right")}) == 1
    assert counts == {("a", "train"): 4, ("b", "train"): 4, ("a", "val"): 2, ("b", "val"): 2,
                      ("a", "test"): 1, ("b", "test"): 1}
    for name in ("a", "b"):
        known = [tuple(row.values()) for row in read(two_sets / name / "t.csv")]
        for row in mixed:
            if row["ref"].startswith(f"{name}/"):
                own = tuple(value.removeprefix(f"{name}/") for value in row.values())
                assert own in known
    assert capsys.readouterr().out.endswith("mix.csv: 8 train, 4 val, 2 test\n")
    assert len(Triplets(two_sets / "mix.csv", "train")) == 8


def test_another_seed_draws_another_share(two_sets):
    texts = []
    for seed in (0, 0, 1):
        conversions.main(["mix", f"{two_sets}/m.csv", f"{two_sets}/a/t.csv", f"{two_sets}/b/t.csv",
                          f"--seed={seed}"])
        texts.append((two_sets / "m.csv").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_faults_of_a_mix_are_named(two_sets):
    with pytest.raises(ValueError, match="b/t.csv: lies outside of .*/a, the folder of"):
        conversions.main(["mix", f"{two_sets}/a/m.csv", f"{two_sets}/a/t.csv", f"{two_sets}/b/t.csv"])
    lines = (two_sets / "b/t.csv").read_text().splitlines()
    (two_sets / "b/t.csv").write_text("\n".join(line for line in lines if "val" not in line))
    with pytest.raises(ValueError, match="b/t.csv: has no triplets of split val"):
        conversions.main(["mix", f"{two_sets}/m.csv", f"{two_sets}/a/t.csv", f"{two_sets}/b/t.csv"])


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "data.prepare.triplets", *map(str, arguments)], cwd=ROOT,
        capture_output=True, text=True, timeout=60)


def test_the_command_converts_and_says_how_many(tmp_path):
    np.save(tmp_path / "m.npy", distances(30))
    done = command("rdm", tmp_path / "m.npy", listed(tmp_path, 30), tmp_path / "out.csv")
    assert done.returncode == 0, done.stderr  # 1 near x 1 far image: one triplet an anchor
    assert done.stdout == f"{tmp_path}/out.csv: 24 train, 3 val, 3 test\n"


@pytest.mark.parametrize("arguments, message", [
    (["things", "t.csv", "list.txt"], "write: python -m data.prepare.triplets things TRIPLETS "),
    (["similar", "t.csv", "out.csv"], "write: python -m data.prepare.triplets things TRIPLETS"),
    (["things", "t.csv", "none.txt", "out.csv"],
     "No such file or directory: 'none.txt'")])
def test_a_wrong_command_is_one_line_and_exit_2(tmp_path, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["triplets.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        conversions.run_main(conversions.main)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error
