"""Benchmark sets: the table, the strict layout, and metrics equal to CLIP_benchmark's.

The planted CLIP below has a known answer: an image of one grey value v and a text whose first
letter has the code v point the same way, whatever else they hold.
"""
import base64
import dataclasses
import hashlib
import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data import benchmarks
from data.prepare import tars
from data.benchmarks import LISTS, ROWS, BenchmarkSet
from data.prepare.tars import write_set
import evaluate
from data.images import MEAN, STD, eval_image
from data.text import Tokenizer
from data.triplets import Triplets
from model import CLIP, SIZES

BYTES = "".join(f"{base64.b64encode(bytes([byte]) + bytes(mark)).decode()} {256 * mark + byte}\n"
                for mark in (0, 1) for byte in range(256))  # a vocabulary of single bytes

def evaluate_set(clip, tokenizer, folder, **how):
    """The zero-shot task of the set in a folder, without its probe."""
    return next(iter(evaluate.evaluate_set(clip, tokenizer, BenchmarkSet(folder), **how).values()))


TOKENIZER = Tokenizer(BYTES)


class PlantedCLIP(torch.nn.Module):
    """Image of grey value v -> unit vector v; text -> unit vector of its first letter's code."""

    def __init__(self):
        super().__init__()
        self.config = dataclasses.replace(SIZES["toy"], image_size=8, vocab_size=TOKENIZER.size)
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))
        self.texts = 0  # how many it was asked for

    def encode_image(self, images):
        value = ((images[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255).round().long()  # (b,)
        return torch.eye(TOKENIZER.size)[value]

    def encode_text(self, tokens):
        self.texts += len(tokens)
        first = tokens[:, 1]
        return torch.eye(TOKENIZER.size)[torch.where(first < 512, first % 256, first)]


def png(value, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, "PNG")
    return buffer.getvalue()


def samples(letters, labels):
    """One 8 x 8 image for each letter, which the planted CLIP recognises."""
    for i, (letter, label) in enumerate(zip(letters, labels)):
        yield f"s{i:07d}", "png", png(ord(letter)), label


def put(folder, letters="abcabc", labels=(0, 1, 2, 0, 1, 2), classnames="abc", templates=("{c}",),
        **more):
    return write_set(folder, "planted", list(classnames), list(templates), samples(letters, labels),
                     **more)


# ------------------------------------------------------------------------------ the table


def test_the_table_has_32_rows_and_both_lists_29_and_2_retrieval_sets():
    assert len(ROWS) == 32
    for rows in LISTS.values():
        assert sum(row.family != "retrieval" for row in rows) == 29
        assert sum(row.family == "retrieval" for row in rows) == 2


def test_the_list_of_the_code_has_413108_images_and_top_5_for_26_of_29():
    rows = LISTS["code"][:29]
    assert sum(row.n for row in rows) == 413_108  # the images of all 29
    assert sum(row.classes >= 5 for row in rows) == 26


def test_published_main_metrics_give_the_published_family_means():
    assert np.mean([row.published[0] for row in ROWS[1:5]]) == pytest.approx(49.8, abs=0.06)
    for name, mean in {"flickr30k": 68.8, "mscoco_captions": 40.3}.items():
        to_image, _, to_text, _ = benchmarks.ROW_OF[name].published
        assert (to_image + to_text) / 2 == pytest.approx(mean, abs=0.06)


def test_a_row_goes_by_one_name_whichever_home_it_came_from(tmp_path):
    folder = write_set(tmp_path, "vtab-cifar10", list("ab"), ["{c}"], samples("ab", (0, 1)))
    os.rename(folder, tmp_path / "wds_vtab-cifar10")
    assert list(benchmarks.find_sets(tmp_path)) == ["cifar10"]


def test_one_set_from_both_homes_is_refused(tmp_path):
    for name in ("cifar10", "vtab-cifar10"):
        write_set(tmp_path, name, list("ab"), ["{c}"], samples("ab", (0, 1)))
    with pytest.raises(ValueError, match="same set"):
        benchmarks.find_sets(tmp_path)


def test_a_set_of_other_size_than_its_row_is_told(tmp_path):
    found = BenchmarkSet(write_set(tmp_path, "mnist", list("ab"), ["{c}"], samples("ab", (0, 1))))
    assert "2 images in 2 classes, but MNIST has 10,000 in 10" in benchmarks.unlike_row(found)


@pytest.mark.parametrize("n, classes, same", [(6, 3, True), (7, 3, False), (6, 4, False)])
def test_a_set_is_like_its_row_in_images_and_classes(tmp_path, monkeypatch, n, classes, same):
    row = benchmarks.Row("Planted", "misc", ("planted",), n, classes, "acc1", 1, (0.0, 0.0))
    monkeypatch.setattr(benchmarks, "ROWS", (row,))
    monkeypatch.setattr(benchmarks, "ROW_OF", {"planted": row})
    assert (benchmarks.unlike_row(BenchmarkSet(put(tmp_path))) == "") == same


# ------------------------------------------------------------------------------ the layout


def test_what_is_written_is_read_back(tmp_path):
    found = BenchmarkSet(put(tmp_path, family="plain", per_shard=4))
    assert (found.name, found.type, found.family) == ("planted", "classification", "plain")
    assert found.classnames == ["a", "b", "c"] and found.templates == ["{c}"]
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert [found.image(i).getpixel((0, 0))[0] for i in range(6)] == [ord(c) for c in "abcabc"]


def test_twelve_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    labels = list(range(12))
    found = BenchmarkSet(put(tmp_path, "a" * 12, labels, "abcdefghijkl", per_shard=1))
    assert found.labels.tolist() == labels


def test_a_set_without_family_is_other(tmp_path):
    assert BenchmarkSet(put(tmp_path)).family == "other"


def test_the_same_samples_have_the_same_fingerprints_and_other_names_do_not(tmp_path):
    first = BenchmarkSet(put(tmp_path / "1")).fingerprints
    again = BenchmarkSet(put(tmp_path / "2", per_shard=2)).fingerprints
    other = BenchmarkSet(put(tmp_path / "3", classnames="abd")).fingerprints
    assert first == again
    assert [key for key in first if first[key] != other[key]] == ["classnames_sha256"]


def test_the_samples_fingerprint_is_of_names_sizes_and_labels(tmp_path):
    content = "".join(f"s{i:07d}.png {len(png(ord(c)))} {i % 3}" for i, c in enumerate("abcabc"))
    expected = hashlib.sha256(content.encode()).hexdigest()
    assert BenchmarkSet(put(tmp_path)).fingerprints["samples_sha256"] == expected


def test_folders_upper_case_and_odd_names_in_a_shard_change_nothing(tmp_path):
    folder = put(tmp_path, "a", [0])
    with tarfile.open(shard_of(folder), "w", format=tarfile.USTAR_FORMAT,
                      encoding="latin-1") as tar:
        entry = tarfile.TarInfo("test")
        entry.type = tarfile.DIRTYPE
        tar.addfile(entry)
        for name, content in (("test/caf\xe9.PNG", png(98)), ("test/caf\xe9.CLS", b"1")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    found = BenchmarkSet(folder)
    assert found.labels.tolist() == [1] and found.image(0).getpixel((0, 0))[0] == 98


def test_an_interrupted_write_leaves_no_set(tmp_path):
    def broken():
        yield from samples("ab", (0, 1))
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_set(tmp_path, "planted", list("ab"), ["{c}"], broken())
    put(tmp_path, family="whole")  # the next one is not disturbed by what was left
    assert list(benchmarks.find_sets(tmp_path)) == ["planted"]


def test_a_set_that_is_there_is_not_overwritten(tmp_path):
    put(tmp_path)
    with pytest.raises(ValueError, match="exists"):
        put(tmp_path)


def shard_of(folder):
    return os.path.join(folder, "test", "0.tar")


def cut(folder, size):
    os.truncate(shard_of(folder), size)


def rewrite(folder, members):
    tars.write_tar(shard_of(folder), members)


def write(folder, name, text):
    with open(os.path.join(folder, name), "w") as file:
        file.write(text)


def overwrite(folder, place, content):
    with open(shard_of(folder), "r+b") as file:
        file.seek(place)
        file.write(content)


def resize(folder, size):
    """Give the third member another size, and its header the checksum that goes with it."""
    with open(shard_of(folder), "r+b") as file:
        file.seek(2 * 1024)  # a header takes 512 bytes, as does the data of each member here
        header = bytearray(file.read(512))
        header[124:124 + len(size)] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        file.seek(2 * 1024)
        file.write(header)


BROKEN = "0.tar: broken shard, cut or damaged after "
FAULTS = {  # what is broken -> (how, what the message names)
    "no folder": (shutil.rmtree, "planted_test/classnames.txt"),
    "no class names": (lambda f: os.remove(f"{f}/classnames.txt"), "planted_test/classnames.txt"),
    "no class": (lambda f: write(f, "classnames.txt", ""), "label 1, but classnames.txt has 1 lines"),
    "no placeholder": (lambda f: write(f, "zeroshot_classification_templates.txt", "{c}\na dog\n"),
                       "templates.txt:2: 'a dog' has no {c}"),
    "unknown type": (lambda f: write(f, "dataset_type.txt", "detection"), "'detection' is none of"),
    "no shard count": (lambda f: os.remove(f"{f}/test/nshards.txt"), "planted_test/test/nshards.txt"),
    "odd shard count": (lambda f: write(f, "test/nshards.txt", "two"), "'two' is not a number"),
    "a shard too few": (lambda f: write(f, "test/nshards.txt", "2"), "planted_test/test/1.tar"),
    "a shard too many": (lambda f: shutil.copy(shard_of(f), f"{f}/test/1.tar"),
                         "1.tar: one too many, nshards.txt says 1 shards"),
    "cut in a member": (lambda f: cut(f, 1024 + 520), BROKEN + "s0000000.cls"),
    "cut in a header": (lambda f: cut(f, 1024 + 200), BROKEN + "s0000000.png"),
    "cut between members": (lambda f: cut(f, 2 * 1024), BROKEN + "s0000000.cls"),
    "cut between samples": (lambda f: cut(f, 4 * 1024), BROKEN + "s0000001.cls"),
    "a hole": (lambda f: overwrite(f, 4 * 1024, bytes(2048)), BROKEN + "s0000001.cls"),
    "no tar": (lambda f: overwrite(f, 0, b"<html>" * 200), BROKEN + "its beginning"),
    "nothing in it": (lambda f: cut(f, 0), BROKEN + "its beginning"),
    "damaged header": (lambda f: overwrite(f, 2 * 1024 + 100, b"????"), BROKEN + "s0000000.cls"),
    "damaged size": (lambda f: resize(f, b"77777777777"), BROKEN + "s0000000.cls"),
    "endless size": (lambda f: resize(f, b"\x80" + b"\xff" * 11), BROKEN + "s0000000.cls"),
    "negative size": (lambda f: resize(f, b"\xff" * 12), BROKEN + "s0000000.cls"),
    "empty shard": (lambda f: rewrite(f, []), "no samples"),
    "no label": (lambda f: rewrite(f, [("s1.png", png(97))]), "0.tar: s1 has png; needs cls and one of jpg"),
    "no image": (lambda f: rewrite(f, [("s1.cls", b"0")]), "0.tar: s1 has cls; needs cls and one of jpg"),
    "two images": (lambda f: rewrite(f, [("s1.png", png(97)), ("s1.jpg", b""), ("s1.cls", b"0")]),
                   "0.tar: s1 has png, jpg, cls; needs cls and one of jpg"),
    "repeated part": (lambda f: rewrite(f, [("a/s1.cls", b"0"), ("a/s1.CLS", b"0")]),
                      "0.tar: s1.cls is there twice"),
    "label too high": (lambda f: rewrite(f, [("s1.png", png(97)), ("s1.cls", b"3")]),
                       "s1.cls: label 3, but classnames.txt has 3 lines"),
    "label no number": (lambda f: rewrite(f, [("s1.png", png(97)), ("s1.cls", b"-1")]),
                        "s1.cls: label -1, but classnames.txt has 3 lines"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_set_is_refused_by_name(tmp_path, fault):
    folder = put(tmp_path)
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        BenchmarkSet(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x93NUMPY\1\0"])
def test_a_multilabel_file_that_is_no_array_is_refused(tmp_path, content):
    folder = put(tmp_path, "a", [[1, 0, 1]], dataset_type="multilabel")
    rewrite(folder, [("s1.png", png(97)), ("s1.npy", content)])
    with pytest.raises(ValueError, match="0.tar: s1.npy: .+$"):
        BenchmarkSet(folder)


def test_an_image_without_captions_is_refused(tmp_path):
    folder = write_set(tmp_path, "planted", [], [], samples("ab", (["a"], [])), None, "retrieval")
    with pytest.raises(ValueError, match="s0000001.txt: no caption"):
        BenchmarkSet(folder)


@pytest.mark.parametrize("label", [[1, 0], [0, 2, 1]])
def test_a_multilabel_vector_of_other_length_or_values_is_refused(tmp_path, label):
    folder = put(tmp_path, "a", [label], dataset_type="multilabel")
    with pytest.raises(ValueError, match="s0000000.npy: must be 3 values of 0 or 1"):
        BenchmarkSet(folder)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"<html>", png(97)[:45], b""], ids=["html", "cut", "empty"])
def test_an_undecodable_image_ends_the_evaluation_by_name(tmp_path, content, workers):
    folder = put(tmp_path)
    rewrite(folder, [("s1.png", png(97)), ("s1.cls", b"0"), ("s2.png", content), ("s2.cls", b"0")])
    with pytest.raises(ValueError, match=r"^[^\n]*0\.tar: s2\.png: undecodable image \(.+\)$"):
        evaluate_set(PlantedCLIP(), TOKENIZER, folder, workers=workers)


# ------------------------------------------------------------------------------ preprocessing


def random_pictures(rng, count):
    """(extension, bytes) of noise in many sizes, modes and file formats."""
    modes = {"png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "jpg": ("L", "RGB", "CMYK"),
             "webp": ("RGB", "RGBA")}
    for _ in range(count):
        extension = str(rng.choice(list(modes)))
        mode, (width, height) = str(rng.choice(modes[extension])), rng.integers(5, 120, 2)
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
        else:
            noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            image = Image.fromarray(noise).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG"}.get(extension, extension))
        yield extension, buffer.getvalue()


def pillow_form(content, size):
    """Resize and centre crop as torchvision does on Pillow images, written out: (S,S,3) uint8."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    w, h = image.size
    nw, nh = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    if (nw, nh) != (w, h):
        image = image.resize((nw, nh), Image.Resampling.BICUBIC)
    x, y = int(round((nw - size) / 2.0)), int(round((nh - size) / 2.0))
    return np.asarray(image)[y:y + size, x:x + size]


def pixels_of(folder, name, pictures):
    """What a set of this name gives of [(extension, bytes)]: its .about() and Pillow images."""
    found = BenchmarkSet(write_set(folder, name, ["a"], ["{c}"],
                                   [(f"s{i:03}", *picture, 0) for i, picture in enumerate(pictures)]))
    return found.about(), [found.image(i) for i in range(len(found))]


def test_pixels_of_a_published_row_are_bit_equal_to_the_pillow_form_on_200_pictures(tmp_path):
    pictures = list(random_pictures(np.random.default_rng(0), 200))
    about, images = pixels_of(tmp_path, "mnist", pictures)
    assert about["pixels"] == "as published"
    for i, (_, content) in enumerate(pictures):
        pixels = eval_image(images[i], 32).permute(1, 2, 0).numpy()  # (3,S,S) -> (S,S,3)
        assert np.array_equal(pixels, pillow_form(content, 32)), i


def test_own_sets_have_the_same_pixels_where_nothing_is_turned_or_deep(tmp_path):
    pictures = [picture for picture in random_pictures(np.random.default_rng(0), 200)
                if Image.open(io.BytesIO(picture[1])).mode != "I;16"]
    (about, own), (_, published) = (pixels_of(tmp_path, name, pictures)
                                    for name in ("noise", "mnist"))
    assert about["pixels"] == "upright" and len(pictures) > 150
    for i, image in enumerate(own):
        assert image.mode == "RGB" and np.array_equal(image, published[i]), i


@pytest.mark.parametrize("name", ["vtab-cifar10", "photos"])
def test_own_photos_stand_upright_and_16_bits_are_scaled_but_rows_are_as_published(tmp_path, name):
    photo, deep = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: to be turned by 90 degrees clockwise
    Image.new("L", (40, 20), 99).save(photo, "JPEG", exif=exif)
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(deep, "PNG")
    clear = io.BytesIO()
    Image.new("LA", (8, 8), (0, 0)).save(clear, "PNG")  # black, and not to be seen
    _, images = pixels_of(tmp_path, name, [("jpg", photo.getvalue()), ("png", deep.getvalue()),
                                           ("png", clear.getvalue())])
    seen = images[0].size, images[1].getpixel((0, 0))[0], images[2].getpixel((0, 0))[0]
    assert seen == (((20, 40), 128, 255) if name == "photos" else ((40, 20), 255, 0))


# ------------------------------------------------------------------------------ planted answers


def test_n_minus_k_of_n_right_is_counted_exactly(tmp_path):
    letters, labels = "abcde" * 8, [i % 5 for i in range(40)]
    labels[3], labels[17], labels[30] = 0, 0, 1  # three images that are something else
    result = evaluate_set(PlantedCLIP(), TOKENIZER, put(tmp_path, letters, labels, "abcde"),
                          batch_size=7)
    assert result["metrics"]["acc1"] == 37 / 40
    assert result["metrics"]["acc5"] == 1.0
    assert np.flatnonzero(~result["hits"]["acc1"]).tolist() == [3, 17, 30]


def test_mean_per_class_recall_is_over_the_classes_present(tmp_path):
    # class a: 1 of 2 right, b: absent, c: 3 of 3, d: absent
    folder = put(tmp_path, "abccc", (0, 0, 2, 2, 2), "abcd")
    metrics = evaluate_set(PlantedCLIP(), TOKENIZER, folder)["metrics"]
    assert metrics["mean_per_class_recall"] == 0.75 and metrics["acc1"] == 0.8
    assert evaluate.mean_per_class_recall(np.array([1, 0, 1]), np.array([3, 3, 5])) == 0.75


def test_a_class_is_a_unit_vector_however_far_apart_its_prompts_point():
    prompts = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])  # two of each class
    classes = evaluate.class_vectors(prompts, torch.arange(4).view(2, 2))
    assert torch.allclose(classes, torch.tensor([[0.5 ** 0.5, 0.5 ** 0.5, 0], [0, 0, 1]]))
    image = torch.tensor([[0.8 * 0.5 ** 0.5, 0.8 * 0.5 ** 0.5, 0.6]])  # cosines 0.8 and 0.6
    assert evaluate.classify(image, classes, [0])[0]["acc1"] == 1  # the plain mean has 0.57, 0.6


def test_top_5_is_absent_below_five_classes(tmp_path):
    assert evaluate_set(PlantedCLIP(), TOKENIZER, put(tmp_path))["metrics"]["acc5"] is None


def test_an_empty_class_line_keeps_the_labels_in_place(tmp_path):
    folder = put(tmp_path, "abbc", (0, 2, 2, 3), ["a", "", "b", "c"])
    result = evaluate_set(PlantedCLIP(), TOKENIZER, folder)
    assert result["classes"] == 4 and result["metrics"]["acc1"] == 1.0


def test_prompts_come_class_after_class(tmp_path):
    found = BenchmarkSet(put(tmp_path, classnames="abc", templates=["a {c}", "the {c}"]))
    assert found.prompts() == ["a a", "the a", "a b", "the b", "a c", "the c"]


def test_braces_in_a_class_name_survive(tmp_path):
    found = BenchmarkSet(put(tmp_path, "a", [0], ["a{b}{c}"], ["see {c} or {c}"]))
    assert found.prompts() == ["see a{b}{c} or a{b}{c}"]


def test_each_distinct_prompt_is_encoded_once_in_a_run(tmp_path):
    clip, prompts = PlantedCLIP(), {}
    first = put(tmp_path / "1", classnames="aba")  # two equal names
    other = put(tmp_path / "2", classnames="abc")  # one new name
    evaluate_set(clip, TOKENIZER, first, prompts=prompts)
    assert clip.texts == 2
    evaluate_set(clip, TOKENIZER, other, prompts=prompts)
    assert clip.texts == 3


def test_a_caption_is_found_if_its_image_is_and_an_image_by_any_of_its_captions(tmp_path):
    # image a: captions a, a, z (two of three lead to it); image b: caption b
    folder = write_set(tmp_path, "planted", [], [], samples("ab", (["a", "a", "z"], ["b"])), None,
                       "retrieval")
    result = evaluate_set(PlantedCLIP(), TOKENIZER, folder)
    assert result["hits"]["image_retrieval_recall@1"].sum() >= 3  # z is equally far from both
    assert result["metrics"]["text_retrieval_recall@1"] == 1.0
    assert (result["n"], result["captions"]) == (2, 4)


def test_workers_change_nothing(tmp_path):
    clip = CLIP(dataclasses.replace(SIZES["toy"], vocab_size=TOKENIZER.size)).eval()
    folder = put(tmp_path, "abcde" * 8, [i % 5 for i in range(40)], "abcde", ["a {c}", "the {c}"])
    results = [evaluate_set(clip, TOKENIZER, folder, batch_size=16, workers=n) for n in (0, 2)]
    assert results[0]["metrics"] == results[1]["metrics"]


def test_bfloat16_is_another_arithmetic_with_unit_float32_embeddings(tmp_path):
    clip = CLIP(dataclasses.replace(SIZES["toy"], vocab_size=TOKENIZER.size)).eval()
    cpu = torch.device("cpu")
    both = [evaluate.embed_texts(clip, TOKENIZER, ["a dog", "cats"], {}, cpu, dtype=dtype)
            for dtype in ("float32", "bfloat16")]
    assert both[1].dtype == torch.float32 and not torch.equal(*both)
    assert torch.allclose(both[1].norm(dim=1), torch.ones(2), atol=1e-6)
    assert (both[0] * both[1]).sum(1).min() > 0.99  # bfloat16 keeps 8 bits


def test_a_pass_draws_nothing_from_the_generator_of_the_run(tmp_path):
    folder = put(tmp_path)
    torch.manual_seed(0)
    evaluate_set(PlantedCLIP(), TOKENIZER, folder)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


def test_progress_counts_all_images_and_all_texts(tmp_path, monkeypatch):
    passes = []

    class Count:
        def __init__(self, label, total, unit):
            self.unit, self.total, self.done = unit, total, 0
            passes.append(self)

        def add(self, amount):
            self.done += amount
    monkeypatch.setattr(evaluate, "Progress", Count)
    evaluate_set(PlantedCLIP(), TOKENIZER, put(tmp_path), batch_size=4, label="planted")
    assert [(p.unit, p.done, p.total) for p in passes] == [("texts", 3, 3), ("images", 6, 6)]


def test_ties_count_half_in_2afc(tmp_path):
    for name, value in {"ref": 100, "near": 100, "far": 200}.items():
        (tmp_path / f"{name}.png").write_bytes(png(value))
    (tmp_path / "t.csv").write_text("ref,left,right,label,split\n"
                                    "ref.png,near.png,far.png,0,test\n"  # right
                                    "ref.png,near.png,far.png,1,test\n"  # wrong
                                    "ref.png,near.png,near.png,1,test\n"  # a tie
                                    "ref.png,far.png,near.png,1,test\n")  # right
    task = evaluate.evaluate_triplets(PlantedCLIP().encode_image,
                                        Triplets(tmp_path / "t.csv", "test"), 8,
                                        torch.device("cpu"))["nights"]
    assert task["metrics"]["2afc"] == 2.5 / 4
    assert task["hits"]["2afc"].tolist() == [1, 0, 0.5, 1]


# ------------------------------------------------------------------------------ CLIP_benchmark


def features(n, width, seed):
    """Small whole numbers: many exact ties, and sums that are exact in any order."""
    return torch.randint(-2, 3, (n, width), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_accuracies_equal_clip_benchmarks_with_ties_and_absent_classes():
    sklearn = pytest.importorskip("sklearn.metrics", reason="tests/requirements.txt has it")
    images, classes = features(3000, 6, 0), features(30, 6, 1)
    present = torch.tensor([c for c in range(28) if c % 7 != 3])  # 3, 10, 17, 24, 28, 29 are absent
    labels = present[torch.randint(0, 24, (3000,), generator=torch.Generator().manual_seed(2))]
    metrics, _ = evaluate.classify(images, classes, labels.numpy())
    logits = 100.0 * images @ classes.T
    ranked = logits.topk(5, 1, True, True)[1]  # its accuracy(): ties fall as topk lets them
    right = ranked.eq(labels[:, None])
    assert metrics["acc1"] == pytest.approx(right[:, 0].float().mean().item(), abs=1e-6)
    assert metrics["acc5"] == pytest.approx(right.any(1).float().mean().item(), abs=1e-6)
    recall = sklearn.balanced_accuracy_score(labels, logits.argmax(1))
    assert metrics["mean_per_class_recall"] == pytest.approx(recall, abs=1e-6)


def test_average_precision_equals_the_written_out_mean_with_ties_and_an_absent_class():
    images, classes = features(400, 5, 3), features(7, 5, 4)
    truth = np.random.default_rng(0).random((400, 7)) < 0.2
    truth[:, 6] = False
    metrics, _ = evaluate.rank_labels(images, classes, truth)
    logits = (100.0 * images @ classes.T).numpy()
    expected = []
    for c in range(7):
        found, precisions = 0, []
        for rank, i in enumerate(np.argsort(-logits[:, c], kind="stable"), 1):
            if truth[i, c]:
                found += 1
                precisions.append(found / rank)
        expected.append(sum(precisions) / max(len(precisions), 1))
    assert metrics["mean_average_precision"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_average_precision_equals_scikit_learns_without_ties():
    sklearn = pytest.importorskip("sklearn.metrics", reason="tests/requirements.txt has it")
    rng = np.random.default_rng(1)
    scores, truth = torch.from_numpy(rng.permutation(500).astype(float)), rng.random(500) < 0.1
    assert evaluate.average_precision(scores, torch.from_numpy(truth)) == pytest.approx(
        sklearn.average_precision_score(truth, scores.numpy()), abs=1e-6)


def test_recalls_equal_the_written_out_definition_with_ties_and_uneven_captions():
    rng = np.random.default_rng(2)
    image_of = np.repeat(np.arange(200), rng.integers(1, 6, 200))
    images, captions = features(200, 5, 5), features(len(image_of), 5, 6)
    metrics, _ = evaluate.retrieve(images, captions, image_of)
    scores = captions @ images.T  # (m,n)
    own = torch.from_numpy(image_of)[:, None] == torch.arange(200)  # (m,n)
    for k in (1, 5, 10):
        found = own.gather(1, scores.topk(k, dim=1)[1]).any(1).float().mean().item()
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(found, abs=1e-6)
        found = own.T.gather(1, scores.T.topk(k, dim=1)[1]).any(1).float().mean().item()
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(found, abs=1e-6)
    assert metrics["mean_recall@1"] == pytest.approx(
        (metrics["image_retrieval_recall@1"] + metrics["text_retrieval_recall@1"]) / 2, abs=1e-6)


class Finished:
    """A CLIP whose inputs are features already: CLIP_benchmark then normalises and measures."""
    encode_image = encode_text = staticmethod(lambda x: x)


def test_classification_equals_the_package_clip_benchmark():
    package = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification",
                                  reason="pip install --no-deps clip-benchmark")
    torch.manual_seed(0)
    images, prompts = torch.randn(500, 16), torch.randn(12, 3, 16)  # 12 classes, 3 prompts each
    labels = torch.randint(0, 11, (500,))  # the last class is absent
    vectors = package.zero_shot_classifier(
        Finished, lambda texts: prompts["abcdefghijkl".index(texts[0])], list("abcdefghijkl"),
        ["{c}"] * 3, "cpu", amp=False)  # (E,C)
    logits, _ = package.run_classification(
        Finished, vectors, list(zip(images.split(100), labels.split(100))), "cpu", amp=False)
    unit = torch.nn.functional.normalize
    classes = evaluate.class_vectors(unit(prompts.flatten(0, 1), dim=-1),
                                       torch.arange(36).view(12, 3))
    ours, _ = evaluate.classify(unit(images, dim=-1), classes, labels.numpy())
    assert torch.allclose(classes.T, vectors, atol=1e-6)
    ranked = logits.topk(5, 1, True, True)[1].eq(labels[:, None])  # its accuracy() needs NumPy 1
    assert ours["acc1"] == pytest.approx(ranked[:, 0].float().mean().item(), abs=1e-6)
    assert ours["acc5"] == pytest.approx(ranked.any(1).float().mean().item(), abs=1e-6)


def test_retrieval_equals_the_package_clip_benchmark():
    package = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval",
                                  reason="pip install --no-deps clip-benchmark")
    torch.manual_seed(1)
    images, counts = torch.randn(60, 8), [1 + i % 4 for i in range(60)]
    image_of = torch.repeat_interleave(torch.arange(60), torch.tensor(counts))
    captions = images[image_of] + 1.5 * torch.randn(len(image_of), 8)
    texts = iter(captions.split(counts))
    batches = [(part, [list(next(texts)) for _ in part]) for part in images.split(20)]
    theirs = package.evaluate(Finished, batches, torch.stack, "cpu", amp=False,
                              recall_k_list=[1, 5, 10])
    unit = torch.nn.functional.normalize
    ours, _ = evaluate.retrieve(unit(images, dim=-1), unit(captions, dim=-1), image_of)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-6)
