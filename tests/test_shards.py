"""data/shards.py: tars as they come, the index, and every fault a shard can have."""
import base64
import errno
import fcntl
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.prepare import check, index, tars
from data.prepare.tars import in_order, write_set, write_shards, write_tar
from data.shards import Shards, caption_lines, find_index, index_shards
from data.text import Tokenizer

BYTES = [bytes([value]) for value in range(256)]
VOCABULARY = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in
                     enumerate(BYTES + [byte + b"\0" for byte in BYTES]))


def picture(number=0):
    """A small PNG that no other number has."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(file, "PNG")
    return file.getvalue()


def samples(count, first=0):
    return [(f"{i:04d}", "png", picture(i), [f"picture {i}"]) for i in range(first, first + count)]


def pair(key, caption=b"a caption"):
    return [(f"{key}.png", picture()), (f"{key}.txt", caption)]


def problems_of(folder):
    """{reason: {"count", "examples"}} of a folder, as its index says."""
    index_shards(folder)
    return find_index(folder)[1]["problems"]


def counts_of(folder):
    return {reason: entry["count"] for reason, entry in problems_of(folder).items()}


def arrays(folder):
    """Everything an index holds but the times of the shards."""
    files = {path.name: path.read_bytes() for path in folder.glob("index/*/*.npy")}
    assert len(files) == 4
    return files, Shards(folder).fingerprint


# ---------------------------------------------------------------- writing

def test_a_tar_has_the_same_bytes_every_time_and_tarfile_reads_it(tmp_path):
    members = [("a/b.txt", b"text"), ("x" * 150 + ".bin", bytes(1000)), ("empty", b"")]
    write_tar(tmp_path / "one.tar", members)
    write_tar(tmp_path / "two.tar", members)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert [(m.name, tar.extractfile(m).read()) for m in tar] == members


def test_a_tar_whose_source_fails_is_not_there_at_all(tmp_path):
    def members():
        yield "a.txt", b"text"
        raise RuntimeError("source")
    with pytest.raises(RuntimeError, match="source"):
        write_tar(tmp_path / "one.tar", members())
    assert list(tmp_path.iterdir()) == []


def test_write_shards_fills_shards_in_turn_and_counts(tmp_path):
    assert write_shards(tmp_path, iter(samples(6)), per_shard=3) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00001.tar"]
    assert write_shards(tmp_path / "other", samples(7), per_shard=3) == 7
    assert len(list((tmp_path / "other").iterdir())) == 3


def test_write_shards_does_not_mix_two_runs(tmp_path):
    write_shards(tmp_path, samples(1))
    with pytest.raises(ValueError, match="holds .tar files already"):
        write_shards(tmp_path, samples(1))


def test_captions_are_written_one_a_line(tmp_path):
    captions = ["two\nlines  and \u2028more", None, " ", "\ud800 alone", "plain"]
    write_shards(tmp_path, [("k", "png", picture(), captions)])
    index_shards(tmp_path)
    assert Shards(tmp_path).captions(0) == ["two lines and more", "? alone", "plain"]


@pytest.mark.parametrize("kind, label, content", [
    ("classification", 2, b"2"), ("retrieval", ["one", "zwei ü"], "one\nzwei ü".encode()),
    ("multilabel", [0, 1, 1], None)])
def test_a_set_is_written_with_its_labels_in_shards_that_are_counted(
        tmp_path, kind, label, content):
    images = [(f"s{i}", "png", picture(i), label) for i in range(3)]
    folder = Path(write_set(tmp_path, "own", ["x", "y", "z"], ["a {c}"], images,
                            dataset_type=kind, per_shard=2))
    assert folder == tmp_path / "wds_own_test"
    assert (folder / "test" / "nshards.txt").read_text() == "2\n"
    with tarfile.open(folder / "test" / "1.tar") as tar:
        image, text = [tar.extractfile(member).read() for member in tar]
    assert image == picture(2)
    if kind == "multilabel":
        assert np.load(io.BytesIO(text)).tolist() == label
    else:
        assert text == content


@pytest.mark.parametrize("first_fails", [True, False])
def test_on_the_way_out_no_other_job_begins(monkeypatch, first_fails):
    leaving, begun = threading.Event(), []

    class Pool(ThreadPoolExecutor):  # jobs after the first are held up until it is shut down
        def shutdown(self, **options):
            super().shutdown(wait=False, **options)
            leaving.set()
            super().shutdown()

    def work(number):
        begun.append(number)
        if number > 0:
            assert leaving.wait(60)
        elif first_fails:
            raise ValueError("the first job")
    monkeypatch.setattr(tars, "ProcessPoolExecutor", Pool)
    results = in_order(work, range(16), workers=2)
    if first_fails:
        with pytest.raises(ValueError, match="the first job"):
            next(results)
    else:  # as Ctrl-C in what uses the results
        next(results)
        results.close()
    assert 0 < len(begun) <= 3


def test_processes_of_an_index_are_not_forked(monkeypatch):
    """A forked copy of a process with threads, as those of a group of ranks, can hang."""
    methods = []

    def pool(workers, context):
        methods.append(context.get_start_method())
        return ThreadPoolExecutor(workers)
    monkeypatch.setattr(tars, "ProcessPoolExecutor", pool)
    assert list(in_order(str, range(3), workers=2)) == ["0", "1", "2"]
    assert methods == ["spawn"]


# ---------------------------------------------------------------- reading tars

@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, dialect):
    names = ["a.txt", "folder/" * 12 + "long.png", "d/ü.txt", "empty.txt"]
    if dialect != tarfile.USTAR_FORMAT:
        names += ["n" * 300 + ".txt", "ü" * 120 + ".png"]
    with tarfile.open(tmp_path / "t.tar", "w", format=dialect) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for size, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 511 * size
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    with tarfile.open(tmp_path / "t.tar") as tar:
        expected = [(m.name.encode(), m.offset_data, m.size) for m in tar if m.isreg()]
    assert index.read_members(tmp_path / "t.tar") == (expected, None)


def test_a_pair_is_read_by_number_in_any_order(tmp_path):
    write_shards(tmp_path, samples(10), per_shard=4)
    assert index_shards(tmp_path) == 10
    pairs = Shards(tmp_path)
    for i in (9, 0, 4, 3, 9):
        assert pairs[i] == (picture(i), [f"picture {i}"])
    assert pairs.name(9) == "00002.tar:0009"
    assert len(pairs) == 10


def test_parts_of_a_sample_need_not_be_neighbours(tmp_path):
    write_tar(tmp_path / "0.tar", [("b/1.png", picture(1)), ("b/2.png", picture(2)),
                                   ("b/2.txt", b"two"), ("b/1.txt", b"one\n\nuno\n")])
    index_shards(tmp_path)
    assert Shards(tmp_path)[0] == (picture(1), ["one", "uno"])
    assert Shards(tmp_path)[1] == (picture(2), ["two"])


def test_json_beside_a_caption_and_hidden_files_are_passed_over(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.json", b'{"caption": "no"}'), *pair("a"), ("._a.png", b"?"),
                                   ("b.PNG", picture()), ("b.txt", b"b"), ("c.json", b"{}")])
    assert index_shards(tmp_path) == 2
    assert Shards(tmp_path).captions(0) == ["a caption"]
    assert counts_of(tmp_path) == {}


def test_members_of_unknown_kinds_are_counted_and_named(tmp_path):
    write_tar(tmp_path / "0.tar", [*pair("a"), ("b.v2.png", picture()), ("b.v2.txt", b"b"),
                                   ("22.05.png", picture()), ("README", b"hello")])
    assert problems_of(tmp_path) == {"unknown kind after the first dot": {"count": 4, "examples": [
        "0.tar:b.v2.png", "0.tar:b.v2.txt", "0.tar:22.05.png", "0.tar:README"]}}
    with pytest.raises(SystemExit):
        check.main([str(tmp_path)])


def test_a_folder_of_unknown_kinds_only_says_so(tmp_path):
    write_tar(tmp_path / "0.tar", pair("b.v2"))
    with pytest.raises(ValueError, match="no usable pair: .*2 x unknown kind.*0.tar:b.v2.png"):
        index_shards(tmp_path)


@pytest.mark.parametrize("content, captions", [
    ({"caption": "A dog,\nrunning\u2028fast", "text": "no"}, ["A dog, running fast"]),
    ({"caption": None, "text": "a \ud800 cat"}, ["a ? cat"])])
def test_a_caption_in_json_is_read_where_there_is_no_txt(tmp_path, capsys, content, captions):
    members = [("a.json", json.dumps(content).encode()), ("a.png", picture(1)), *pair("b")]
    write_tar(tmp_path / "0.tar", members)
    tokenizer = Tokenizer(VOCABULARY)
    assert index_shards(tmp_path, tokenizer) == 2
    assert capsys.readouterr().out.count("1 x caption from .json (kept): 0.tar:a") == 1
    found = Shards(tmp_path, tokenizer)
    assert found[0] == (picture(1), captions)
    assert found[1] == (picture(), ["a caption"])
    assert found.ids(0, 0).tolist() == tokenizer.encode(captions)[0]
    check.main([str(tmp_path)])  # without SystemExit


@pytest.mark.parametrize("raw", [b"{", b"\xff", b"[1]", b'{"caption": 3}', b'{"caption": " "}'])
def test_a_json_without_a_caption_is_an_empty_caption(tmp_path, raw):
    write_tar(tmp_path / "0.tar", [("a.json", raw), ("a.png", picture()), *pair("b")])
    assert counts_of(tmp_path) == {"empty caption": 1}


def test_shards_in_subfolders_are_found_but_not_those_set_aside(tmp_path):
    places = ["01", "00/a", "held_out", "00/held_out", "index", "val", "wds_x/test",
              "p.unfinished", ".trash"]
    for number, place in enumerate(places):
        write_tar(tmp_path / place / "0.tar", pair(f"{number}"))
    assert index_shards(tmp_path) == 2
    found = Shards(tmp_path)
    assert [found.name(i) for i in range(2)] == ["00/a/0.tar:1", "01/0.tar:0"]
    assert found[1] == (picture(), ["a caption"])
    write_tar(tmp_path / "0.tar", pair("x"))  # a folder with shards of its own
    assert index_shards(tmp_path) == 1


@pytest.mark.parametrize("name", ["held_out", "val", "valid", "validation", "test", "index"])
def test_a_subfolder_of_this_name_is_never_trained_on(tmp_path, name):
    for place in ("train", name):
        write_tar(tmp_path / place / "0.tar", pair("a"))
    assert index_shards(tmp_path) == 1


def test_held_out_pairs_are_not_part_of_the_folder(tmp_path):
    write_shards(tmp_path, samples(3))
    write_shards(tmp_path / "held_out", samples(2, first=50))
    assert index_shards(tmp_path) == 3 and index_shards(tmp_path / "held_out") == 2


# ---------------------------------------------------------------- faults

@pytest.mark.parametrize("members, reason", [
    ([("x.png", picture())], "image without caption"),
    ([("x.txt", b"text")], "caption without image"),
    (pair("x", b""), "empty caption"),
    (pair("x", b" \n\t\n\r\n"), "empty caption"),
    (pair("x", b"\0\0"), "empty caption"),
])
def test_a_sample_without_a_part_is_left_out_counted_and_named(tmp_path, members, reason):
    write_tar(tmp_path / "0.tar", [*pair("first"), *members, *pair("last")])
    assert index_shards(tmp_path) == 2
    assert problems_of(tmp_path) == {reason: {"count": 1, "examples": ["0.tar:x"]}}


@pytest.mark.parametrize("again", [pair("x", b"second"), [("x.txt", b"second")],
                                   [("x.jpg", picture(9))]])
def test_of_a_duplicate_key_the_first_is_kept(tmp_path, again):
    write_tar(tmp_path / "0.tar", [*pair("x", b"first"), *pair("y"), *again])
    names = [f"0.tar:{name}" for name, _ in again]
    assert problems_of(tmp_path) == {"duplicate key": {"count": len(names), "examples": names}}
    assert len(Shards(tmp_path)) == 2 and Shards(tmp_path)[0] == (picture(), ["first"])


@pytest.mark.parametrize("raw, captions, reason", [
    ("cafÃ© â€“ tea".encode(), ["cafÃ© â€“ tea"], None),  # mojibake: wrong, but nothing can know
    (b"None", ["None"], None),
    (b"a\0b", ["a b"], None),
    (b"caf\xe9", ["caf\ufffd"], "caption not UTF-8"),  # Latin-1
    (b"x\xed\xa0\x80", ["x" + "\ufffd" * 3], "caption not UTF-8"),  # a lone surrogate
    (b"word " * 20_000, [("word " * 20_000).strip()], None),  # 100 kB
])
def test_an_odd_caption_is_kept(tmp_path, raw, captions, reason):
    write_tar(tmp_path / "0.tar", pair("x", raw))
    assert counts_of(tmp_path) == ({reason: 1} if reason else {})
    assert Shards(tmp_path).captions(0) == captions == caption_lines(raw)


def test_the_caption_None_is_left_out_when_written(tmp_path):
    write_shards(tmp_path, [("a", "png", picture(), [None]), *samples(1)])
    assert counts_of(tmp_path) == {"empty caption": 1}


def test_of_a_cut_tar_the_whole_samples_are_kept(tmp_path):
    write_tar(tmp_path / "whole.tar", [*pair("a"), *pair("b", b"w " * 400), *pair("c")])
    with tarfile.open(tmp_path / "whole.tar") as tar:
        members = {m.name: m.offset_data + m.size for m in tar}
    ends, members = list(members.values()), list(members)
    raw = (tmp_path / "whole.tar").read_bytes()
    for cut in (ends[1] - 1, ends[1], ends[2] - 5, ends[2] + 300, ends[3] - 1, ends[5]):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "0.tar").write_bytes(raw[:cut])
        whole = sum(end <= cut for end in ends[1::2])
        if whole == 0:
            with pytest.raises(ValueError, match="1 x tar cut off"):
                index_shards(folder)
            continue
        last = members[sum(end <= cut for end in ends) - 1]
        problems = problems_of(folder)
        lost = {"count": 1, "examples": [f"0.tar:all after {last}"]}
        assert problems.pop("tar cut off") == lost, cut
        assert list(problems) == ["image without caption"] * last.endswith(".png"), cut
        assert len(Shards(folder)) == whole


def test_a_damaged_header_ends_a_shard_but_not_the_folder(tmp_path):
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, [*pair("a"), *pair("b"), *pair("c")])
    raw = bytearray((tmp_path / "0.tar").read_bytes())
    raw[raw.index(b"b.png")] ^= 1
    (tmp_path / "0.tar").write_bytes(raw)
    assert counts_of(tmp_path) == {"tar cut off": 1}
    names = [Shards(tmp_path).name(i) for i in range(4)]
    assert names == ["0.tar:a", "1.tar:a", "1.tar:b", "1.tar:c"]


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x1f\x8b" + bytes(600), bytes(100)])
def test_a_file_that_is_no_tar_is_named(tmp_path, content):
    write_tar(tmp_path / "0.tar", pair("a"))
    (tmp_path / "1.tar").write_bytes(content)
    assert problems_of(tmp_path) == {"tar cut off": {"count": 1, "examples": ["1.tar:all"]}}


def test_what_follows_the_end_of_a_tar_is_not_lost_without_a_word(tmp_path):
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, pair(name[0]))
    joined = (tmp_path / "0.tar").read_bytes() + (tmp_path / "1.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(joined)
    (tmp_path / "1.tar").unlink()
    assert problems_of(tmp_path)["tar cut off"]["examples"] == ["0.tar:all after 0.txt"]


def test_whatever_byte_is_damaged_no_sample_is_lost_without_a_word(tmp_path):
    write_tar(tmp_path / "0.tar", [*pair("a"), *pair("b" * 120), *pair("c")])
    raw = (tmp_path / "0.tar").read_bytes()
    for at in range(0, len(raw) - 10240 + 512, 37):
        damaged = bytearray(raw)
        damaged[at] ^= 0x41
        (tmp_path / "0.tar").write_bytes(damaged)
        good, problems = index.read_shard(tmp_path, "0.tar")
        assert len(good) == 3 or problems, at


def test_a_folder_without_shards_or_without_pairs_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no .tar shards"):
        index_shards(tmp_path)
    assert not list(tmp_path.iterdir())
    write_tar(tmp_path / "0.tar", [("a.png", picture())])
    with pytest.raises(ValueError, match="holds no usable pair:.*1 x image without caption"):
        index_shards(tmp_path)


# ---------------------------------------------------------------- the index

def test_stored_ids_are_the_tokenizer_s(tmp_path):
    write_shards(tmp_path, [("a", "png", picture(), ["A dog", "two cats"]),
                            ("b", "png", picture(), ["x"])], per_shard=1)
    tokenizer = Tokenizer(VOCABULARY)
    index_shards(tmp_path, tokenizer)
    pairs = Shards(tmp_path, tokenizer)
    found = [pairs.ids(i, c).tolist() for i, c in ((0, 0), (0, 1), (1, 0))]
    assert found == tokenizer.encode(["A dog", "two cats", "x"])
    assert [pairs.caption_count(i) for i in range(2)] == [2, 1]


def test_each_vocabulary_has_its_own_ids(tmp_path):
    write_shards(tmp_path, samples(3))
    merge = base64.b64encode(b"pi").decode()
    one, two = Tokenizer(VOCABULARY), Tokenizer(VOCABULARY + f"{merge} 512\n")
    index_shards(tmp_path, one)
    with pytest.raises(FileNotFoundError, match="has no index of its shards as they are now"):
        Shards(tmp_path, two)
    index_shards(tmp_path, two)
    for tokenizer in (one, two):
        assert Shards(tmp_path, tokenizer).ids(2, 0).tolist() == tokenizer.encode(["picture 2"])[0]
    assert Shards(tmp_path, one).fingerprint == Shards(tmp_path, two).fingerprint


def test_without_a_tokenizer_any_fitting_index_will_do(tmp_path, capsys):
    write_shards(tmp_path, samples(3))
    index_shards(tmp_path)
    write_tar(tmp_path / "00001.tar", pair("new"))
    index_shards(tmp_path, Tokenizer(VOCABULARY))  # the first index is stale now
    assert Shards(tmp_path).captions(3) == ["a caption"]
    capsys.readouterr()
    assert index_shards(tmp_path) == 4 and capsys.readouterr().out == ""


def test_a_fitting_index_is_not_built_again(tmp_path, capsys):
    write_shards(tmp_path, samples(3))
    index_shards(tmp_path)
    assert "indexed" in capsys.readouterr().out
    index_shards(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_changed_shard_is_noticed_and_indexed_again(tmp_path):
    write_shards(tmp_path, samples(4), per_shard=2)
    index_shards(tmp_path)
    before = Shards(tmp_path).fingerprint
    write_tar(tmp_path / "00001.tar", [*pair("new"), *pair("newer"), *pair("newest")])
    with pytest.raises(FileNotFoundError, match="has no index of its shards as they are now"):
        Shards(tmp_path)
    assert index_shards(tmp_path) == 5
    assert Shards(tmp_path).fingerprint != before


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    for name, caption in (("a", "one"), ("b", "one"), ("c", "two")):
        write_shards(tmp_path / name, [("k", "png", picture(), [caption])])
        index_shards(tmp_path / name)
    a, b, c = (Shards(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c  # c's shard has the same size


def test_the_fingerprint_of_the_same_data_is_that_of_earlier_versions(tmp_path):
    """Checkpoints compare it on resume. The value is that of index 1, made with its code."""
    long = "long" * 60
    write_tar(tmp_path / "0.tar", [
        ("a.jpg", b"one"), ("a.txt", b"A dog\n\nuno\n"), ("z.txt", b"first"), ("d/ü.png", b"two"),
        ("d/ü.txt", b"caf\xe9"), ("lost.png", b"three"), ("z.WEBP", b"four"),
        (f"{long}.jpg", b"five"), (f"{long}.txt", b"a\0b")])
    write_tar(tmp_path / "1.tar", [
        ("a.jpg", b"six"), ("a.txt", "ü \u2028 six".encode()), ("a.txt", b"again")])
    index_shards(tmp_path)
    assert Shards(tmp_path).fingerprint == "883b8a78586bf0c8"


def test_times_do_not_make_an_index_stale_but_content_of_the_same_size_does(tmp_path, capsys):
    write_shards(tmp_path, [("k", "png", picture(), ["one"])])
    index_shards(tmp_path)
    capsys.readouterr()
    os.utime(tmp_path / "00000.tar", (0, 0))
    index_shards(tmp_path)
    assert capsys.readouterr().out == ""
    (tmp_path / "00000.tar").unlink()
    write_shards(tmp_path, [("k", "png", picture(), ["two"])])
    index_shards(tmp_path)
    assert Shards(tmp_path).captions(0) == ["two"] and "indexed" in capsys.readouterr().out


def test_a_change_at_the_end_of_a_long_shard_makes_its_index_stale(tmp_path):
    for caption in (b"one", b"two"):
        write_tar(tmp_path / "0.tar", [("a.png", picture() + bytes(2**17)), ("a.txt", caption)])
        assert find_index(tmp_path) is None
        index_shards(tmp_path)


def test_an_index_of_another_format_is_built_anew_without_a_word_of_trouble(tmp_path):
    write_shards(tmp_path, samples(3))
    index_shards(tmp_path)
    path = tmp_path / "index" / "none" / "index.json"
    made = json.loads(path.read_text())
    for shards in (made["shards"], {"00000.tar": [10240, 1764101234567890123]}):
        old = {"format": "perceptual-clip index 1", "shards": shards, "samples": 2}
        path.write_text(json.dumps(old))
        assert index_shards(tmp_path) == 3
    assert json.loads(path.read_text()) == made


@pytest.mark.parametrize("index_is_there", [False, True])
def test_the_index_of_a_folder_that_cannot_be_written_goes_to_the_cache(
        tmp_path, monkeypatch, capsys, index_is_there):
    write_shards(tmp_path / "pairs", samples(3))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mkdir = Path.mkdir

    def refuse(path, *arguments, **options):  # as a read-only mount does; root may write all else
        if path == tmp_path / "pairs" / "index":
            raise OSError(errno.EROFS, "Read-only file system")
        mkdir(path, *arguments, **options)

    def refuse_file(dir):
        raise OSError(errno.EROFS, "Read-only file system")
    if index_is_there:
        (tmp_path / "pairs" / "index").mkdir()
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse_file)
    else:
        monkeypatch.setattr(Path, "mkdir", refuse)
    assert index_shards(tmp_path / "pairs") == 3
    said = capsys.readouterr().out
    assert f"Read-only file system; its index goes to {tmp_path / 'cache'}" in said
    assert Shards(tmp_path / "pairs")[2] == (picture(2), ["picture 2"])
    assert not list(tmp_path.glob("pairs/index/*"))
    assert index_shards(tmp_path / "pairs") == 3 and capsys.readouterr().out == ""


def test_where_locks_are_refused_it_goes_on_without(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path, samples(3))

    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert index_shards(tmp_path) == 3
    assert "No locks available; going on without a lock" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("index/*")) == ["lock", "none"]


def test_of_two_that_build_without_a_lock_the_first_index_stays(tmp_path):
    write_shards(tmp_path, samples(3))
    place = tmp_path / "index"
    place.mkdir()
    index._build(tmp_path, None, place / ".none.one", place / "none")
    before = (place / "none" / "samples.npy").stat().st_ino
    index._build(tmp_path, None, place / ".none.two", place / "none")
    assert (place / "none" / "samples.npy").stat().st_ino == before  # still in use
    assert [path.name for path in place.glob("*")] == ["none"]


def test_indexing_needs_no_torch():
    code = "import sys, data.prepare.index; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)
    assert done.stdout.split() == ["False"], done.stderr


class Failing(Tokenizer):
    """Is interrupted at the third shard, and counts what it encodes."""

    def encode(self, captions):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().encode(captions)


def test_an_interrupted_build_goes_on_and_ends_the_same(tmp_path):
    for name in ("stopped", "straight"):
        write_shards(tmp_path / name, samples(8), per_shard=2)
    index_shards(tmp_path / "straight", Tokenizer(VOCABULARY))
    failing = Failing(VOCABULARY)
    with pytest.raises(KeyboardInterrupt):
        index_shards(tmp_path / "stopped", failing)
    with pytest.raises(FileNotFoundError):
        Shards(tmp_path / "stopped", failing)
    index_shards(tmp_path / "stopped", failing)
    assert failing.calls == 5  # two shards, the interrupt, the two shards left
    assert arrays(tmp_path / "stopped") == arrays(tmp_path / "straight")


def test_what_an_interrupted_build_made_of_a_shard_that_changed_since_is_not_used(tmp_path):
    write_shards(tmp_path, samples(8), per_shard=2)
    failing = Failing(VOCABULARY)
    with pytest.raises(KeyboardInterrupt):
        index_shards(tmp_path, failing)
    members = [("0000.png", picture(0)), ("0000.txt", b"changed  \n"), *pair("0001")]
    size = (tmp_path / "00000.tar").stat().st_size
    write_tar(tmp_path / "00000.tar", members)
    assert (tmp_path / "00000.tar").stat().st_size == size
    index_shards(tmp_path, failing)
    assert Shards(tmp_path, failing).ids(0, 0).tolist() == failing.encode(["changed"])[0]


def test_several_processes_build_the_same_index_as_one(tmp_path, monkeypatch):
    write_shards(tmp_path / "one", samples(12), per_shard=2)
    write_shards(tmp_path / "several", samples(12), per_shard=2)
    index_shards(tmp_path / "one")
    monkeypatch.setattr(index, "BYTES_A_PROCESS", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    index_shards(tmp_path / "several")
    assert arrays(tmp_path / "one") == arrays(tmp_path / "several")


def test_ranks_that_index_at_once_build_once(tmp_path, capfd):
    write_shards(tmp_path, samples(40), per_shard=1)
    with multiprocessing.Pool(3) as pool:
        assert pool.map(index_shards, [tmp_path] * 3, chunksize=1) == [40] * 3
    assert capfd.readouterr().out.count("indexed") == 1
    assert sorted(path.name for path in tmp_path.glob("index/*")) == ["lock", "none"]


def test_going_to_a_worker_costs_no_arrays(tmp_path):
    write_shards(tmp_path, samples(300))
    index_shards(tmp_path)
    sent = pickle.dumps(Shards(tmp_path))
    assert len(sent) < 1000
    assert pickle.loads(sent)[299] == (picture(299), ["picture 299"])


@pytest.mark.parametrize("soft, hard, kept", [(20, 200, 30), (40, 40, 20)])
def test_all_shards_stay_open_as_far_as_the_limit_of_open_files_allows(tmp_path, soft, hard, kept):
    write_shards(tmp_path, samples(30), per_shard=1)
    index_shards(tmp_path)
    code = f"""if True:
        import os, resource
        from data.shards import Shards
        resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
        pairs, before = Shards({str(tmp_path)!r}), len(os.listdir("/proc/self/fd"))
        captions = [pairs[i][1] for _ in range(2) for i in range(30)]
        assert captions == 2 * [[f"picture {{i}}"] for i in range(30)]
        print(len(os.listdir("/proc/self/fd")) - before)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)
    assert done.stdout.split() == [str(kept)], done.stderr


# ---------------------------------------------------------------- check

def test_check_reports_bad_members_by_reason_and_exits_1(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [*pair("a"), ("b.jpg", b"<html>"), ("b.txt", b"b"),
                                   ("c.png", b""), ("c.txt", b"c"), ("d.png", picture())])
    with pytest.raises(SystemExit) as stop:
        check.main([str(tmp_path)])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "1 good pairs\n" in printed
    for reason in ("image: not an image (left out): 0.tar:b", "image: empty (left out): 0.tar:c",
                   "image without caption (left out): 0.tar:d"):
        assert f"1 x {reason}" in printed


def test_check_of_sound_shards_ends_well_and_builds_no_index(tmp_path, capsys):
    write_shards(tmp_path, samples(5), per_shard=2)
    check.main([str(tmp_path)])
    assert "5 good pairs\n" in capsys.readouterr().out
    assert not (tmp_path / "index").exists()


def test_check_takes_one_folder(tmp_path):
    for folders in ([], ["a", "b"]):
        with pytest.raises(ValueError, match="takes one folder of shards"):
            check.main(folders)


def test_a_shard_cut_while_in_use_is_an_error(tmp_path):
    write_shards(tmp_path / "p", [("a", "png", b"picture", ["a long caption of an image"])])
    index_shards(tmp_path / "p")
    pairs = Shards(tmp_path / "p")
    assert pairs.captions(0) == ["a long caption of an image"]
    row = pairs._samples[0]
    os.truncate(tmp_path / "p" / "00000.tar", int(row["text_at"] + row["text_size"]) - 9)
    with pytest.raises(ValueError, match="00000.tar became shorter while it was in use"):
        pairs.captions(0)
