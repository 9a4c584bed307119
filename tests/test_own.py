"""Packing a folder of pictures: what gets in, under which caption, and what is said of the rest."""
import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.images import decode
from data.prepare.captions import caption_of_names
from data.prepare.own import find_pictures, is_held_out, main, shrink


def picture(path, size=(40, 30), seed=0, **options):
    """Draw a smooth random picture into a file, so that JPEG keeps it well."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return path


def packs(folder):
    """{key without its number: (kind, bytes, captions)} of every shard in a folder."""
    found, kinds = {}, {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                content = tar.extractfile(member).read()
                if kind == "txt":
                    found[key] = content.decode().splitlines()
                else:
                    kinds[key] = kind, content
    return {key.partition("_")[2]: (*kinds[key], found[key]) for key in sorted(kinds)}


def run(images, target, *options):
    main([str(images), str(target), "--workers=1", *options])
    return json.loads((target / f"{images.name}.json").read_text())


def skips(target, name):
    lines = (target / f"{name}.skipped.tsv").read_text().splitlines()
    return dict(line.split("\t") for line in lines)


@pytest.fixture
def images(tmp_path):
    """Four pictures in two folders."""
    for i, name in enumerate(["birds/grey_heron_02.png", "birds/owl.jpg", "cat.png", "dog.webp"]):
        picture(tmp_path / "images" / name, seed=i)
    return tmp_path / "images"


def test_captions_of_a_csv_are_found_and_several_rows_are_several_captions(images, tmp_path):
    (tmp_path / "c.csv").write_text("file,caption,other\ncat.png,a cat,1\ncat.png,a kitten,2\n"
                                    'birds/owl.jpg,"an owl, asleep",3\n')
    report = run(images, tmp_path / "out", f"--captions={tmp_path}/c.csv")
    found = {key: captions for key, (_, _, captions) in packs(tmp_path / "out").items()}
    assert found == {"cat": ["a cat", "a kitten"], "birds_owl": ["an owl, asleep"]}
    assert report["pairs"] == 2 and report["skipped"] == {"not in the caption file": 2}
    assert report["pictures"] == 4


def test_captions_of_a_jsonl_may_be_lists(images, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"file_name": "cat.png", "text": ["a cat", "a kitten"]}\n'
                                      '{"file_name": "dog.webp", "text": "a dog"}\n')
    run(images, tmp_path / "out", f"--captions={tmp_path}/c.jsonl")
    assert packs(tmp_path / "out")["cat"][2] == ["a cat", "a kitten"]


def test_the_first_line_beside_a_picture_is_its_caption(images, tmp_path):
    (images / "cat.txt").write_text("A cat.\nde.utf8=Eine Katze.\n")
    run(images, tmp_path / "out", "--captions=beside")
    assert packs(tmp_path / "out")["cat"][2] == ["A cat."]


def test_all_lines_beside_a_picture_are_captions_on_request(images, tmp_path):
    (images / "cat.txt").write_text("A cat.\nA grey cat.\n")
    run(images, tmp_path / "out", "--captions=beside", "--lines=all")
    assert packs(tmp_path / "out")["cat"][2] == ["A cat.", "A grey cat."]


def test_names_make_captions_without_counters():
    assert caption_of_names("animals/birds/grey_heron_02.png") == "grey heron, birds, animals"
    assert caption_of_names("01.png") == ""


def test_every_skip_is_counted_and_named(images, tmp_path):
    captions = {"cat.png": "a cat", "empty.jpg": "nothing", "html.jpg": "a page", "blank.png": " ",
                "gone.png": "not there", "cut.jpg": "half", "dangling.png": "nowhere",
                "again.png": "the cat once more", "null.png": None, "surrogate.png": "a \ud800 b"}
    (images / "empty.jpg").write_bytes(b"")
    (images / "html.jpg").write_text("<html>not found</html>")
    cut = picture(images / "cut.jpg", (300, 300))
    cut.write_bytes(cut.read_bytes()[:cut.stat().st_size // 2])
    (images / "again.png").write_bytes((images / "cat.png").read_bytes())
    (images / "dangling.png").symlink_to("nowhere.png")
    for i, name in enumerate(["blank.png", "null.png", "surrogate.png"]):
        picture(images / name, seed=10 + i)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"file": name, "caption": text}) + "\n"
                                              for name, text in captions.items()))
    report = run(images, tmp_path / "out", f"--captions={tmp_path}/c.jsonl")
    assert skips(tmp_path / "out", "images") == {
        "empty.jpg": "empty", "html.jpg": "not an image", "cut.jpg": "truncated",
        "dangling.png": "unreadable file", "blank.png": "empty caption",
        "null.png": "empty caption", "gone.png": "no such picture; near: none",
        "cat.png": "same picture again, its captions went to the first",
        "birds/grey_heron_02.png": "not in the caption file",
        "birds/owl.jpg": "not in the caption file", "dog.webp": "not in the caption file"}
    assert report["skipped"]["empty caption"] == 2 and report["pairs"] == 2  # again, surrogate
    assert report["pictures"] == 12 == report["pairs"] + sum(report["skipped"].values())
    assert report["no pictures"] == {"no such picture": 1}
    assert packs(tmp_path / "out")["surrogate"][2] == ["a ? b"]


def test_captions_that_are_not_utf8_are_skipped(images, tmp_path):
    (images / "cat.txt").write_bytes(b"caf\xe9")
    (images / "dog.txt").write_text("a dog")
    run(images, tmp_path / "out", "--captions=beside")
    assert skips(tmp_path / "out", "images")["cat.png"] == "caption is not UTF-8"


def test_a_small_picture_keeps_its_bytes():
    file = io.BytesIO()
    Image.new("RGB", (300, 256)).save(file, "WEBP")
    assert shrink(file.getvalue(), 256) == ("webp", file.getvalue())


def test_a_large_picture_gets_the_short_side_and_keeps_its_shape_and_colours(tmp_path):
    path = picture(tmp_path / "large.png", (1200, 900))
    kind, data = shrink(path.read_bytes(), 256)
    small = Image.open(io.BytesIO(data))
    assert kind == "jpg" and small.size == (341, 256)
    reference = Image.open(path).resize((341, 256), Image.Resampling.BOX)
    apart = np.abs(np.asarray(small, float) - np.asarray(reference, float)).mean()
    assert apart < 2  # of 255: JPEG at quality 90 and another resampling filter, on smooth colours


def test_transparency_becomes_white_when_a_picture_is_shrunk():
    file = io.BytesIO()
    Image.new("RGBA", (500, 500), (0, 0, 0, 0)).save(file, "PNG")
    assert decode(shrink(file.getvalue(), 256)[1]).getpixel((9, 9)) == (255, 255, 255)


def test_other_formats_become_jpeg_at_their_size():
    file = io.BytesIO()
    Image.new("RGB", (50, 40), "red").save(file, "BMP")
    kind, data = shrink(file.getvalue(), 256)
    assert kind == "jpg" and Image.open(io.BytesIO(data)).size == (50, 40)


def test_held_out_pictures_are_the_share_asked_for_and_stay_when_others_come(tmp_path):
    for i in range(60):
        picture(tmp_path / "images" / f"picture{i}.png", (9, 9), seed=i)
    run(tmp_path / "images", tmp_path / "out", "--captions=names", "--held_out=0.3")
    held = {name for name in packs(tmp_path / "out" / "held_out")}
    train = {name for name in packs(tmp_path / "out")}
    assert held == {f"picture{i}" for i in range(60) if is_held_out(f"picture{i}.png", 0.3)}
    assert not held & train and len(held) + len(train) == 60
    share = np.mean([is_held_out(f"{i}.png", 0.3) for i in range(5000)])
    assert abs(share - 0.3) < 0.02  # three standard deviations of 5,000 draws


def test_two_processes_write_what_one_does(images, tmp_path):
    for workers in ("1", "2"):
        main([str(images), str(tmp_path / workers), "--captions=names", f"--workers={workers}"])
    one, two = (packs(tmp_path / workers) for workers in ("1", "2"))
    assert one == two and len(one) == 4


def test_two_packs_share_a_target(images, tmp_path):
    run(images, tmp_path / "out", "--captions=names", "--per_shard=3")
    main([str(images / "birds"), str(tmp_path / "out"), "--captions=names", "--workers=1"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "birds-00000.tar", "birds.json", "birds.skipped.tsv", "images-00000.tar",
        "images-00001.tar", "images.json", "images.skipped.tsv"]


def test_a_second_pack_of_one_name_is_refused(images, tmp_path):
    run(images, tmp_path / "out", "--captions=names")
    with pytest.raises(ValueError, match="already: to add new pictures, .* under another --name"):
        run(images, tmp_path / "out", "--captions=names")


def test_an_interrupted_pack_leaves_no_shard_and_can_be_repeated(images, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("data.prepare.own.os.replace", None)  # dies when the first shard should appear
        with pytest.raises(TypeError):
            run(images, tmp_path / "out", "--captions=names")
    assert not list((tmp_path / "out").glob("*.tar"))
    assert run(images, tmp_path / "out", "--captions=names")["pairs"] == 4


@pytest.mark.parametrize("name, text, message", [
    ("c.csv", "name,words\ncat.png,a cat\n", "row 2: needs one column of a file, named as one of"),
    ("c.csv", "file,words\ncat.png,a cat\n", "row 2: needs one column of a caption, .*the columns are file, words"),
    ("c.csv", "file,image,caption\na,b,c\n", "row 2: needs one column of a file, .* are file, image, caption"),
    ("c.csv", "file,caption\n,a cat\n", "row 2: needs the name of a file"),
    ("c.csv", "file,caption,caption\na,b,c\n", "row 1: two columns have one name"),
    ("c.jsonl", "null\n", "row 1: needs one column of a file"),
    ("c.json", "[null]", "row 1: needs one column of a file"),
    ("c.csv", 'file,caption\ncat.png,"a" cat\n', "row 2: a quote that is not closed"),
    ("c.csv", 'file,caption\ncat.png,"a cat\n', "row 2: a quote that is not closed"),
    ("c.jsonl", '{"file": "cat.png", "caption": "a"}\n{"file"\n', "row 2: Expecting"),
    ("c.jsonl", "[1]\n", "row 1: not an object"),
    ("c.jsonl", '{"file": "cat.png", "caption": 3}\n', "row 1: needs a caption, as text"),
    ("c.csv", "file,caption\ncat.png,caf\udce9\n", "c.csv: not UTF-8 .*; save it as UTF-8"),
    ("c.json", '{"images": []}', "must be COCO's"),
    ("c.json", '{"images": [], "annotations": [{"image_id": 3}]}', "must be COCO's captions .* 3"),
    ("c.txt", "cat.png#0\ta cat\ncat.png a cat\n", "row 2: not name.jpg#0<tab>text"),
    ("c.parquet", "PAR1", "c.parquet, row 1: "),
])
def test_a_caption_file_that_cannot_be_meant_is_named(images, tmp_path, name, text, message):
    (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        run(images, tmp_path / "out", f"--captions={tmp_path / name}")


def test_captions_that_are_nowhere_are_refused_with_what_may_stand_there(images, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; name a table .* beside or names"):
        run(images, tmp_path / "out", "--captions=besides")


# ------------------------------------------------------------------------- tables as people have them

def captions_of(images, tmp_path, name, text, *options):
    """Pack with a table of this name and text -> {picture: captions}, and the report."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    report = run(images, tmp_path / "out", f"--captions={tmp_path / name}", *options)
    assert report["pictures"] == report["pairs"] + sum(report["skipped"].values())
    found = packs(tmp_path / "out")
    return {key: captions for key, (_, _, captions) in found.items()}, report


def test_a_comma_without_quotes_is_refused_with_its_row_and_cells(images, tmp_path):
    with pytest.raises(ValueError, match="c.csv, row 3: 4 cells, the header has 2; .* quotes"):
        captions_of(images, tmp_path, "c.csv", "file,caption\ndog.webp,a dog\n"
                    "cat.png,A cat, asleep, on grass\n")
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("name, text", [
    ("captions.txt", "image,caption\ncat.png,a cat\ncat.png,a kitten\n"),      # Flickr8k, Kaggle's
    ("Flickr8k.token.txt", "cat.png#0\ta cat\ncat.png#1\ta kitten\n"),
    ("results.csv", "image_name| comment_number| comment\ncat.png| 0| a cat\ncat.png| 1| a kitten\n"),
    ("train.csv", "filepath\ttitle\ncat.png\ta cat\ncat.png\ta kitten\n"),     # open_clip
    ("c.csv", "file;caption\r\ncat.png;a cat\r\ncat.png;a kitten\r\n;\r\n"),  # Excel, in Europe
    ("c.csv", "\ufefffile,caption,\ncat.png,a cat,\ncat.png,a kitten,,,\n"),
    ("c.tsv", "File Name\tfile\tCaption\n1\tcat.png\ta cat\n1\tcat.png\ta kitten\n"),
    ("c.jsonl", '{"image": "cat.png", "captions": ["a cat", "a kitten"]}\n\n'),
    ("c.json", '[{"image": "cat.png", "text": "a cat"}, {"image": "cat.png", "text": "a kitten"}]'),
    ("captions_val.json", '{"info": {}, "images": [{"id": 7, "file_name": "cat.png"}], "annotations":'
     ' [{"image_id": 7, "id": 1, "caption": "a cat"}, {"image_id": 7, "caption": "a kitten"}]}'),
])
def test_a_table_as_a_data_set_has_it_is_read(images, tmp_path, name, text):
    found, report = captions_of(images, tmp_path, name, text)
    assert found == {"cat": ["a cat", "a kitten"]}
    assert report["skipped"] == {"not in the caption file": 3} and not report["notes"]


def test_a_table_in_utf16_is_read(images, tmp_path):  # Excel's "Unicode text"
    (tmp_path / "c.txt").write_bytes("file\tcaption\ncat.png\tカット\n".encode("utf-16"))
    run(images, tmp_path / "out", f"--captions={tmp_path}/c.txt")
    assert packs(tmp_path / "out")["cat"][2] == ["カット"]


def test_a_row_without_a_caption_cell_is_counted(images, tmp_path):  # Flickr30k's has such a row
    found, report = captions_of(images, tmp_path, "c.csv", "image| number| comment\n"
                                "cat.png| 0| a cat\ncat.png| 4   A cat sits\n")
    assert found == {"cat": ["a cat"]} and report["notes"] == {"rows without a caption": 1}


def test_a_parquet_table_of_names_is_read(images, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet files are written with pyarrow")
    from pyarrow import parquet
    table = pa.table({"file_name": ["cat.png", "dog.webp"], "text": ["a cat", None]})
    parquet.write_table(table, tmp_path / "c.parquet")
    report = run(images, tmp_path / "out", f"--captions={tmp_path}/c.parquet")
    assert packs(tmp_path / "out")["cat"][2] == ["a cat"]
    assert report["skipped"] == {"not in the caption file": 2, "empty caption": 1}


@pytest.mark.parametrize("struct", [True, False])
def test_a_parquet_file_with_the_pictures_in_it_is_packed(images, tmp_path, struct):
    pa = pytest.importorskip("pyarrow", reason="parquet files are written with pyarrow")
    from pyarrow import parquet
    data = [(images / name).read_bytes() for name in ("cat.png", "dog.webp", "cat.png")] + [None]
    column = [{"bytes": item, "path": "x.png"} for item in data] if struct else data
    table = pa.table({"image": column, "caption": [["a cat", "a kitten"], ["a dog"], ["Tom"], ["x"]],
                      "filename": ["1", "2", "3", "4"]})
    parquet.write_table(table, tmp_path / "pets.parquet")
    main([str(tmp_path / "pets.parquet"), str(tmp_path / "out"), "--workers=1"])
    found = packs(tmp_path / "out")
    assert found["pets-0000000"] == ("png", data[0], ["a cat", "a kitten", "Tom"])
    assert found["pets-0000001"] == ("webp", data[1], ["a dog"]) and len(found) == 2
    report = json.loads((tmp_path / "out" / "pets.json").read_text())
    assert report["pictures"] == 4
    assert report["skipped"] == {"same picture again, its captions went to the first": 1, "empty": 1}


def test_several_rows_without_a_picture_are_no_copies_of_each_other(images, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet files are written with pyarrow")
    from pyarrow import parquet
    data = [(images / "cat.png").read_bytes(), None, None]
    parquet.write_table(pa.table({"image": data, "caption": ["a cat", "x", "y"]}),
                        tmp_path / "pets.parquet")
    main([str(tmp_path / "pets.parquet"), str(tmp_path / "out"), "--workers=1"])
    assert json.loads((tmp_path / "out" / "pets.json").read_text())["skipped"] == {"empty": 2}


@pytest.mark.parametrize("share", ["10", "1", "-0.1"])
def test_held_out_is_a_share(images, tmp_path, share):
    with pytest.raises(ValueError, match="held_out=.*: is a share, from 0 to below 1"):
        run(images, tmp_path / "out", "--captions=names", f"--held_out={share}")


def test_equal_pictures_are_one_pair_with_all_their_captions(tmp_path):
    for i in range(5):  # as img2dataset leaves COCO's
        picture(tmp_path / "images" / f"{i}.jpg", seed=7)
        (tmp_path / "images" / f"{i}.txt").write_text(f"caption {i % 4}\n")
    report = run(tmp_path / "images", tmp_path / "out", "--captions=beside")
    assert packs(tmp_path / "out")["0"][2] == [f"caption {i}" for i in range(4)]
    assert report["pictures"] == 5 and report["pairs"] == 1
    assert list(report["skipped"].values()) == [4]


def test_folders_that_are_links_are_followed_and_loops_noticed(images, tmp_path):
    picture(tmp_path / "elsewhere" / "fox.png", seed=9)
    (images / "more").symlink_to(tmp_path / "elsewhere")
    (images / "birds" / "back").symlink_to(images)
    report = run(images, tmp_path / "out", "--captions=names")
    assert "more_fox" in packs(tmp_path / "out") and report["pictures"] == report["pairs"] == 5
    assert skips(tmp_path / "out", "images") == {"birds/back": "link to a folder that it lies in"}


def test_a_folder_that_cannot_be_read_is_named(images, tmp_path, monkeypatch):
    scandir = os.scandir

    def refuse_birds(folder):
        if str(folder).endswith("birds"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", refuse_birds)
        names, passed = find_pictures(images)
    assert names == ["cat.png", "dog.webp"]
    assert passed == [(str(images / "birds"), "unreadable folder")]


@pytest.mark.parametrize("before", ["images/", "{folder}/", "./", "/other/machine/images/", "D:\\pets\\"])
def test_names_with_a_path_before_them_are_matched(images, tmp_path, before):
    before = before.format(folder=images)
    names = ["cat.png", "birds/owl.jpg", "gone/owl.jpg"]
    text = "".join(f"{before}{name},{name}\n" for name in names)
    found, report = captions_of(images, tmp_path, "c.csv", "file,caption\n" + text)
    assert found == {"cat": ["cat.png"], "birds_owl": ["birds/owl.jpg"]}
    assert report["no pictures"] == {"no such picture": 1}
    near = skips(tmp_path / "out", "images")[before.removeprefix("./") + "gone/owl.jpg"]
    assert near == "no such picture; near: birds/owl.jpg"


def test_names_that_could_be_two_pictures_are_not_matched(images, tmp_path):
    picture(images / "owl.jpg", seed=20)
    text = "file,caption\n/a/cats/owl.jpg,a cat\n/b/dogs/owl.jpg,a dog\nowl.png,an owl\n"
    with pytest.raises(ValueError, match="nothing could be packed; .*images.skipped.tsv says why"):
        captions_of(images, tmp_path, "c.csv", text)
    assert skips(tmp_path / "out", "images")["/a/cats/owl.jpg"].startswith("no such picture; near: ")


def test_names_in_another_folder_are_not_matched_but_near_ones_named(images, tmp_path):
    found, _ = captions_of(images, tmp_path, "c.csv", "file,caption\ndog.webp,a dog\n"
                           "pets/cat.png,a cat\nages/cat.png,a cat\nCAT,a cat\n")
    assert list(found) == ["dog"]
    said = skips(tmp_path / "out", "images")
    for name in ("pets/cat.png", "ages/cat.png", "CAT"):  # the folder is called images
        assert said[name] == "no such picture; near: cat.png"


def test_a_parquet_file_with_pictures_is_refused_beside_other_pictures(images, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet files are written with pyarrow")
    from pyarrow import parquet
    parquet.write_table(pa.table({"image": [b"x"], "text": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="row 1: needs the name of a file, .* is given as IMAGES"):
        run(images, tmp_path / "out", f"--captions={tmp_path}/p.parquet")


def test_accents_are_matched_however_they_are_stored(images, tmp_path):
    picture(images / "cafe\u0301.png", seed=8)  # as macOS stores it
    found, _ = captions_of(images, tmp_path, "c.csv", "file,caption\ncaf\u00e9.png,a café\n")
    assert list(found.values()) == [["a café"]]


def test_a_caption_with_breaks_in_it_stays_one_and_is_counted(images, tmp_path):
    rows = [{"file": "cat.png", "caption": "a\ncat\u2028sits\x85here"},
            {"file": "dog.webp", "caption": "a dog\n"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    found, report = captions_of(images, tmp_path, "c.jsonl", text)
    assert found == {"cat": ["a cat sits here"], "dog": ["a dog"]}
    assert report["notes"] == {"captions have line breaks inside: written as one line": 1}


@pytest.mark.parametrize("lines, expected", [
    ("first", ["A cat sits."]), ("all", ["A cat sits.", "It sleeps."]), ("one", ["A cat sits. It sleeps."])])
def test_several_lines_beside_a_picture_are_counted_and_what_to_do_is_said(
        images, tmp_path, capsys, lines, expected):
    (images / "cat.txt").write_text("\nA cat\u2028sits.\r\nIt sleeps.\n")
    (images / "dog.txt").write_text("A dog.\n")
    report = run(images, tmp_path / "out", "--captions=beside", f"--lines={lines}")
    assert packs(tmp_path / "out")["cat"][2] == expected
    said = "1  caption files have several lines" in capsys.readouterr().out
    assert said == (lines != "one") and report["pairs"] == 2


def test_the_command_says_an_error_in_one_line_and_exits_with_2(tmp_path):
    done = subprocess.run([sys.executable, "-m", "data.prepare.own", "nowhere", str(tmp_path / "out"),
                           "--captions=names"], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("own.py: nowhere: no such folder, or no picture in it (")
