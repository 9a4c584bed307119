"""The toy world: is what it says drawn, is what is drawn said, and do the readers read it?"""
import csv
import hashlib
import json
import platform
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.prepare import toy
from data.benchmarks import BenchmarkSet
from data.shards import Shards, index_shards
from data.text import Tokenizer
from data.triplets import Triplets

# the sizes of conftest's toy_world
SMALL = ["--pairs=601", "--held_out=53", "--triplets=400", "--per_set=48"]


def draw(n, seed=0, **given):
    """n single-object scenes."""
    return toy.draw_scenes(np.random.default_rng(seed), n, many=0, **given)


def hashes(folder):
    """{file: sha256} of all that is drawn."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()
            and "index" not in path.parts[len(folder.parts):]}  # other tests read the pairs


def to_lab(rgb):
    """(..., 3) sRGB 0..255 -> CIELAB by the definition (CIE 15, D65), the other way than toy.py."""
    c = np.asarray(rgb, float) / 255
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    x = c @ [0.4124, 0.3576, 0.1805] / 0.9505
    y = c @ [0.2126, 0.7152, 0.0722]
    z = c @ [0.0193, 0.1192, 0.9505] / 1.0888
    x, y, z = (np.where(v > 216 / 24389, np.cbrt(v), (24389 / 27 * v + 16) / 116)
               for v in (x, y, z))
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def words_for(table):
    """Each word of a table -> the index of what it names."""
    return {word: index for index, words in enumerate(table) for word in words}


# --------------------------------------------------------------------------------- the command

def test_same_seed_gives_the_same_bytes_whatever_the_processes(toy_world, tmp_path):
    subprocess.run([sys.executable, "-m", "data.prepare.toy", f"--out={tmp_path / 'again'}", *SMALL,
                    "--processes=2"], check=True, timeout=100)
    assert hashes(tmp_path / "again") == hashes(toy_world)


# sha256 of a small world as it was first drawn, by NumPy with AVX-512 and with AVX2 or less: their
# roundings differ in one of its 1,700 pictures, by two grey levels
WORLDS = ("131d3964daab90d0ed76e835ba7f365bbf89839cee503e9a2e811a29e3d3017b",
          "40f84294627327ff4c700db0fa81e9ae31182f7faca15c78f30b20ecfe078736")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other roundings")
def test_the_bytes_of_a_seed_do_not_change(tmp_path):
    folder = tmp_path / "world"
    toy.main([f"--out={folder}", "--pairs=300", "--held_out=50", "--triplets=100", "--per_set=24",
              "--processes=1"])
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "world.json":  # which names the settings
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    assert digest.hexdigest() in WORLDS


def test_another_seed_gives_other_scenes(toy_world, tmp_path):
    toy.write_pairs(tmp_path / "pairs", toy.Config(seed=1), 0, 40)
    with tarfile.open(tmp_path / "pairs" / "00000.tar") as new, \
            tarfile.open(toy_world / "pairs" / "00000.tar") as old:
        name = "000000000.jpg"
        assert new.extractfile(name).read() != old.extractfile(name).read()


def test_a_complete_world_is_left_alone(toy_world, capsys):
    before = (toy_world / "world.json").stat().st_mtime_ns
    toy.main([f"--out={toy_world}", *SMALL])
    assert (toy_world / "world.json").stat().st_mtime_ns == before
    assert capsys.readouterr().out.startswith(f"{toy_world} is complete")


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something that is not a toy world"):
        toy.main([f"--out={tmp_path}"])
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_an_interrupted_draw_left_goes_with_the_next(tmp_path, monkeypatch):
    def drawn(config, folder):
        folder.mkdir()
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(toy, "draw_world", drawn)
        with pytest.raises(KeyboardInterrupt):
            toy.main([f"--out={tmp_path / 'world'}"])
    assert not (tmp_path / "world").exists()
    monkeypatch.setattr(toy, "draw_world", lambda config, folder: folder.mkdir())
    toy.main([f"--out={tmp_path / 'world'}"])
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "world", "world/world.json"]


def test_another_setting_draws_the_world_again(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "draw_world", lambda config, folder: folder.mkdir())
    for seed in (0, 1):
        toy.main([f"--out={tmp_path / 'world'}", f"--seed={seed}"])
        assert json.loads((tmp_path / "world" / "world.json").read_text())["seed"] == seed


@pytest.mark.parametrize("argument", ["--wrong=1.5", "--pairs=-1", "--captions=0",
                                      "--triplets=0", "data/toy"])
def test_a_senseless_argument_is_one_line(argument):
    with pytest.raises(ValueError) as error:
        toy.main([argument])
    assert argument.lstrip("-") in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------- pictures

def test_every_colour_lies_in_its_region_once_drawn():
    scenes = draw(220, shape=1, texture=0, color=np.arange(220) % 11)  # plain squares
    images = toy.render(scenes, np.random.default_rng(0))
    for image, color, (x, y) in zip(images, scenes.color[:, 0], scenes.xy[:, 0].astype(int)):
        light, a, b = to_lab(np.median(image[y - 3:y + 4, x - 3:x + 4].reshape(-1, 3), axis=0))
        low, high = toy.REGIONS[color]
        assert low[0] - 1 < light < high[0] + 1
        assert low[1] - 2 < np.hypot(a, b) < high[1] + 2  # half a grey level is up to 2 of chroma
        if low[1] > 10:  # greys have no hue
            hue = np.degrees(np.arctan2(b, a)) % 360
            middle, half = (low[2] + high[2]) / 2, (high[2] - low[2]) / 2
            assert abs((hue - middle + 180) % 360 - 180) < half + 2


def test_colour_regions_stay_apart():
    rng = np.random.default_rng(0)
    colors = [toy.draw_colors(rng, np.full(200, region)) for region in range(11)]
    closest = min(np.linalg.norm(a[:, None] - b, axis=-1).min()
                  for i, a in enumerate(colors) for b in colors[:i])
    assert closest > 12  # a just noticeable difference is about 2


def test_objects_stand_out_from_the_backdrop():
    scenes = draw(1000)
    apart = np.linalg.norm(scenes.ground - scenes.lab[:, :1], axis=-1).min(1)
    assert (apart > 20).mean() > 0.98


def test_objects_touch_neither_each_other_nor_the_border():
    scenes = toy.draw_scenes(np.random.default_rng(0), 300, count=np.full(300, 3))
    covers = np.stack([toy.cover(scenes, slot, "") for slot in range(3)])          # (3,300,64,64)
    assert (covers > 0.5).sum(0).max() == 1
    alone = toy.cover(draw(300), 0, "")
    assert max(alone[:, [0, -1]].max(), alone[:, :, [0, -1]].max()) == 0


def test_every_shape_fits_its_circle_and_fills_a_quarter_of_it():
    x, y = np.meshgrid(np.linspace(-1.2, 1.2, 121), np.linspace(-1.2, 1.2, 121))
    circle = np.hypot(x, y) < 1.01
    for name, outline in toy.OUTLINES.items():
        inside = outline(x, y) < 0
        limit = 1.11 if name == "square" else 1.06  # corners reach out a little
        assert np.hypot(x, y)[inside].max() < limit, name
        assert inside.sum() > circle.sum() / 4, name


def test_a_texture_leaves_the_rim_whole():
    plain, dotted = (draw(50, shape=0, texture=texture) for texture in (0, 2))  # circles
    a, b = toy.cover(plain, 0, ""), toy.cover(dotted, 0, "")
    pixel = np.arange(64) + 0.5
    x, y = plain.xy[:, 0].T[..., None, None]
    inward = 0.9 * plain.radius[:, :1, None] - np.hypot(pixel - x, pixel[:, None] - y)
    assert np.array_equal(a[inward < 1.4], b[inward < 1.4]) and (b < a - 0.5).any(axis=(1, 2)).all()


def test_inverted_pictures_are_negatives():
    scenes = draw(20)
    a, b = (toy.render(scenes, np.random.default_rng(0), style) for style in ("", "inverted"))
    assert np.array_equal(a, 255 - b)


# --------------------------------------------------------------------------------- captions

def test_captions_name_only_colours_and_shapes_that_are_there():
    scenes = toy.draw_scenes(np.random.default_rng(0), 500)
    for i, captions in enumerate(toy.caption(scenes, np.random.default_rng(1), 5, 5)):
        for table, drawn in ((toy.WORDS["color"], scenes.color),
                             (toy.WORDS["shape"], scenes.shape)):
            index = words_for(table)
            said = {index[word] for text in captions for word in text.split() if word in index}
            assert said <= set(drawn[i, :scenes.count[i]])


def test_relations_in_captions_are_true():
    n, checked = 400, 0
    scenes = toy.draw_scenes(np.random.default_rng(0), n, count=np.full(n, 2))
    shapes = words_for(toy.WORDS["shape"])
    for i, captions in enumerate(toy.caption(scenes, np.random.default_rng(1), 4, 4)):
        where = {shape: xy for shape, xy in zip(scenes.shape[i, :2], scenes.xy[i])}
        for text in captions:
            match = re.search(r"(\w+) (?:to the )?(left of|right of|above|below) an? .*?(\w+)"
                              r"(?= on a| and nothing|$)", text)
            if match and len(set(scenes.shape[i, :2])) == 2 and \
                    match[1] in shapes and match[3] in shapes:
                right, down = where[shapes[match[3]]] - where[shapes[match[1]]]
                amount = {"left of": right, "right of": -right, "above": down, "below": -down}
                assert amount[match[2]] > 10, text
                checked += 1
    assert checked > 100


def test_counts_in_captions_are_true():
    scenes = toy.draw_scenes(np.random.default_rng(0), 500)
    for count, captions in zip(scenes.count, toy.caption(scenes, np.random.default_rng(1), 3, 3)):
        said = {toy.COUNTS.index(word) + 1 for text in captions for word in text.split()
                if word in toy.COUNTS}
        assert said <= {count}


def test_a_tenth_of_the_training_captions_belongs_elsewhere():
    scenes = toy.draw_scenes(np.random.default_rng(0), 4000)
    right, mixed = (toy.caption(scenes, np.random.default_rng(1), wrong=share)
                    for share in (0.0, toy.Config.wrong))
    changed = np.mean([a != b for a, b in zip(right, mixed)])
    assert abs(changed - 0.1) < 0.015  # 3 standard errors; few captions equal another's by chance


def test_training_pairs_have_as_many_different_captions_as_asked_for(tmp_path):
    toy.write_pairs(tmp_path / "pairs", toy.Config(captions=3, wrong=0.0), 0, 20)
    toy.write_pairs(tmp_path / "one" / "pairs", toy.Config(wrong=0.0), 0, 20)
    several, single = tmp_path / "pairs" / "00000.tar", tmp_path / "one" / "pairs" / "00000.tar"
    with tarfile.open(several) as new, tarfile.open(single) as old:
        for i in range(20):
            lines = new.extractfile(f"00000{i:04}.txt").read().decode().split("\n")
            assert len(lines) == len(set(lines)) == 3
        assert len(old.extractfile("000000000.txt").read().decode().split("\n")) == 1


def test_held_out_pairs_have_one_to_five_different_captions(toy_world):
    index_shards(toy_world / "pairs" / "held_out")
    pairs = Shards(toy_world / "pairs" / "held_out")
    captions = [pairs[i][1] for i in range(len(pairs))]
    assert len(pairs) == 53 and {len(texts) for texts in captions} == {1, 2, 3, 4, 5}
    assert all(len(set(texts)) == len(texts) for texts in captions)


def test_training_pairs_are_read_and_none_is_held_out(toy_world):
    folders = toy_world / "pairs", toy_world / "pairs" / "held_out"
    for folder in folders:
        index_shards(folder)
    seen, unseen = ({pairs[i][0] for i in range(len(pairs))} for pairs in map(Shards, folders))
    assert len(seen) == 601 and len(unseen) == 53 and not seen & unseen


# --------------------------------------------------------------------------------- words

def test_all_that_is_said_is_in_the_vocabulary(toy_world):
    tokenizer = Tokenizer(str(toy_world / "vocabulary" / "toy.tiktoken"))
    scenes = toy.draw_scenes(np.random.default_rng(0), 1000)
    texts = sum(toy.caption(scenes, np.random.default_rng(1), 3, 3), [])
    texts += [prompt.replace("{c}", name) for _, names, prompts, _, _ in
              toy.CLASSIFICATION.values() for name in names for prompt in prompts]
    for text, ids in zip(texts, tokenizer.encode(texts)):
        assert len(ids) == len(re.findall(r"\w+|[^\w\s]", text)) and min(ids) >= 256, text


def test_the_vocabulary_begins_with_bytes_and_fits_the_toy_model(toy_world):
    lines = (toy_world / "vocabulary" / "toy.tiktoken").read_text().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(len(lines)))
    assert lines[97] == "YQ== 97" and lines[256 + 97] == "YQA= 353"  # "a", and "a" that ends a word
    assert len(lines) + 2 <= 1024


def test_other_words_fall_back_to_bytes(toy_world):
    tokenizer = Tokenizer(str(toy_world / "vocabulary" / "toy.tiktoken"))
    assert tokenizer.decode(tokenizer.encode(["a mauve café"])[0]) == "a mauve café"


# --------------------------------------------------------------------------------- triplets

@pytest.fixture(scope="module")
def judged():
    """The default world's triplets without their images: differences (n,5) of left and right from
    the reference, right is nearer (n,), votes (n,)."""
    blocks = [toy.draw_triplets(0, block, 1000) for block in range(toy.Config.triplets // 1000)]
    left, right = (np.concatenate([toy.differences(block[0], block[side]) for block in blocks])
                   for side in (1, 2))
    return left, right, *(np.concatenate([block[i] for block in blocks]) for i in (3, 4))


def test_csv_has_nights_columns_and_files(toy_world):
    with open(toy_world / "nights" / "data.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "left_vote", "right_vote", "votes", "ref_path", "left_path",
                             "right_path", "split", "is_imagenet", "prompt"]
    assert [int(row["id"]) for row in rows] == list(range(400))
    assert all(int(row["left_vote"]) + int(row["right_vote"]) == 1 for row in rows)
    assert {row["right_path"][-6:] for row in rows} == {"_0.jpg", "_1.jpg"}
    assert {row["is_imagenet"] for row in rows} == {"True", "False"}
    for column in ("ref_path", "left_path", "right_path"):
        assert Image.open(toy_world / "nights" / rows[7][column]).size == (64, 64)


def test_the_csv_holds_every_block(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "SETS", ())
    toy.draw_world(toy.Config(pairs=0, held_out=0, triplets=1003, processes=1), tmp_path)
    with open(tmp_path / "nights" / "data.csv") as file:
        assert [int(row["id"]) for row in csv.DictReader(file)] == list(range(1003))


def test_eight_tenths_train_and_the_rest_is_halved(toy_world):
    sizes = [len(Triplets(toy_world / "nights", split, min_votes=1))
             for split in ("train", "val", "test")]
    assert sizes == [320, 40, 40]


def test_four_thousand_training_triplets_have_six_votes(judged):
    votes = judged[3]
    assert votes.min() == 1 and votes.max() == 10
    assert (votes[np.arange(len(votes)) % 10 < 8] >= 6).sum() > 4000


def test_votes_stop_at_the_first_dissent():
    ref, other = draw(4000), draw(4000, seed=1)
    panel = np.ones((toy.PANEL, len(toy.FACTORS)))
    right, votes = toy.judge(np.random.default_rng(0), panel, ref, other, other)  # a coin each
    # 1 + 1/2 + ... + 1/512 throws of a coin until the first differs, ten at most
    assert abs(votes.mean() - 1.998) < 0.07 and abs(right.mean() - 0.5) < 0.03
    right, votes = toy.judge(np.random.default_rng(0), panel, ref, other, ref)
    assert right[votes == 10].all() and (votes == 10).mean() > 0.95


def test_shape_decides_as_often_as_colour(judged):
    left, right, right_nearer, votes = judged
    nearer = np.sign(left - right)[votes >= 6]                                     # (k,5)
    answer = np.where(right_nearer, 1, -1)[votes >= 6, None]
    color, shape, *others = ((nearer == answer) + 0.5 * (nearer == 0)).mean(0)
    assert abs(color - shape) < 0.04 and min(color, shape) > max(others) + 0.1
    assert color < 0.8  # neither alone will do


def test_each_factor_is_counted_in_its_mean_difference():
    mean = toy.differences(draw(4000), draw(4000, seed=1)).mean(0)
    np.testing.assert_allclose(mean, 1, atol=0.05)


def test_shape_differences_are_a_distance_table():
    table = toy.SHAPE_DIFFERENCES
    assert np.array_equal(table, table.T) and (np.diag(table) == 0).all()
    assert table[~np.eye(len(table), dtype=bool)].min() > 0.1
    names = list(toy.SHAPES)  # by hand: 4 * 0.78^2 and 4 * 0.97 * 0.36 overlap in 4 * 0.78 * 0.36
    expected = 1 - 1.1232 / (2.4336 + 1.3968 - 1.1232)
    assert abs(table[names.index("square"), names.index("bar")] - expected) < 0.02


def test_the_three_backdrops_of_a_triplet_differ():
    ref, left, right, _, _ = toy.draw_triplets(0, 0, 100)
    assert not (ref.ground == left.ground).any() and not (left.ground == right.ground).any()


# --------------------------------------------------------------------------------- benchmarks

@pytest.mark.parametrize("name", toy.CLASSIFICATION)
def test_classification_sets_are_read_and_balanced(toy_world, name):
    data = BenchmarkSet(str(toy_world / "benchmarks" / f"wds_{name}_test"))
    family, classes, prompts, _, _ = toy.CLASSIFICATION[name]
    assert (data.family, data.classnames, data.templates) == (family, classes, prompts)
    counts = np.bincount(data.labels, minlength=len(classes))
    assert len(counts) == len(classes) and counts.min() == counts.max()


def test_families_mirror_the_real_rows():
    families = {entry[0] for entry in toy.CLASSIFICATION.values()}
    assert families >= {"plain", "ood", "structured", "fine-grained"}
    assert min(len(entry[1]) for entry in toy.CLASSIFICATION.values()) == 2


def test_one_class_name_is_an_empty_line(toy_world):
    names = (toy_world / "benchmarks" / "wds_toy_place_test" / "classnames.txt").read_text()
    assert names.splitlines()[4] == "" and len(names.splitlines()) == 9


def test_places_are_where_their_labels_say():
    labels = np.arange(90) % 9
    scenes = draw(90, place=labels, size=0)
    column, row = (scenes.xy[:, 0] // (64 / 3)).T
    assert np.array_equal(3 * row + column, labels)


def test_the_counting_set_draws_as_many_objects_as_it_says():
    labels = np.array([1, 2] * 8)  # two or three objects, in quarters of their own
    scenes = draw(16, **toy.CLASSIFICATION["toy_count"][3](labels))
    backdrops = toy.draw_backdrops(scenes, np.random.default_rng(0)).transpose(0, 2, 3, 1)
    drawn = np.abs(toy.render(scenes, np.random.default_rng(0)) - backdrops).max(-1) > 10
    quarters = drawn.reshape(16, 2, 32, 2, 32).any((2, 4)).sum((1, 2))
    assert np.array_equal(quarters, labels + 1)


@pytest.mark.parametrize("name", toy.RETRIEVAL)
def test_retrieval_sets_have_five_different_captions_an_image(toy_world, name):
    data = BenchmarkSet(str(toy_world / "benchmarks" / f"wds_{name}_test"))
    assert data.type == data.family == "retrieval"
    assert np.array_equal(data.labels, np.repeat(np.arange(48), 5))
    assert all(len(set(data.captions[i:i + 5])) == 5 for i in range(0, 240, 5))


def test_sets_have_more_than_ten_shards_at_the_default_size(tmp_path):
    toy.write_set(tmp_path, toy.Config(), "toy_backdrop")
    test = tmp_path / "wds_toy_backdrop_test" / "test"
    assert (test / "nshards.txt").read_text() == "12\n" and len(list(test.glob("*.tar"))) == 12
