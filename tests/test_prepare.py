"""Downloads and the preparation of published data: loopback servers, parquet files, zips."""
import base64
import gzip
import hashlib
import http.server
import io
import json
import os
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import benchmarks
from data.prepare.tars import write_set
from data.prepare import benchmarks as prepare_benchmarks
from data.prepare import nights as prepare_nights
from data.prepare import yfcc15m as prepare_yfcc15m
from data.prepare.download import CHUNK, download, hub_files
from data.log import Progress
from data.shards import Shards, index_shards
from data.text import Tokenizer


class Server(http.server.ThreadingHTTPServer):
    """An HTTP server on the loopback device whose manners a test sets.

    files: {path: bytes}; cut: bytes after which each reply ends, though it promised more;
    ranges: whether it honours Range; log: (path, Range header) of each request;
    fail: {path: [status codes of the first replies]}; page: entries per page of a listing;
    pauses: seconds that the first replies keep silent for; moved: {path: where to go instead}.
    """

    def __init__(self, files, cut=None, ranges=True, fail=None, page=1000, pauses=(), moved=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.cut, self.ranges = files, cut, ranges
        self.fail, self.moved = fail or {}, moved or {}
        self.page, self.pauses, self.log = page, list(pauses), []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        path, asked, server = self.path, self.headers.get("Range"), self.server
        server.log.append((path, asked))
        if server.fail.get(path):
            return self.send_error(server.fail[path].pop(0))
        if path in server.moved:
            self.send_response(302)
            self.send_header("Location", server.moved[path])
            return self.end_headers()
        if path.startswith("/api/datasets/"):
            return self.listing()
        if path not in server.files:
            return self.send_error(404)
        body, begin = server.files[path], 0
        if asked and server.ranges:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            if begin >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        if server.pauses:
            time.sleep(server.pauses.pop(0))
        self.wfile.write(body[begin:][:server.cut])

    def listing(self):
        """The hub's answer: entries of the data set's tree, page by page."""
        route, _, query = self.path.partition("?")
        name, server = "/".join(route.split("/")[3:5]), self.server
        head = f"/datasets/{name}/resolve/main/"
        paths = sorted(path.removeprefix(head) for path in server.files if path.startswith(head))
        start = int(query.partition("cursor=")[2] or 0)
        entries = [{"type": "directory", "path": "data", "size": 0}] if start == 0 else []
        for path in paths[start:start + server.page]:
            body = server.files[head + path]
            entries.append({"type": "file", "path": path, "size": len(body)})
            if path.endswith((".tar", ".parquet")):
                entries[-1]["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body)}
        self.send_response(200)
        if start + server.page < len(paths):
            link = f"{server.address}{route}?recursive=true&cursor={start + server.page}"
            self.send_header("Link", f'<{link}>; rel="next"')
        self.end_headers()
        self.wfile.write(json.dumps(entries).encode())


BODY = np.random.default_rng(0).bytes(3 * CHUNK + 17)  # some 3 MB, so that progress can be made


def test_a_download_has_the_servers_bytes_and_leaves_no_part(tmp_path):
    with Server({"/a.bin": BODY}) as server:
        path = download(server.address + "/a.bin", tmp_path / "sub" / "a.bin", size=len(BODY),
                        sha256=hashlib.sha256(BODY).hexdigest())
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


def test_a_finished_download_asks_the_server_nothing(tmp_path):
    (tmp_path / "a.bin").write_bytes(BODY)
    download("http://127.0.0.1:1/a.bin", tmp_path / "a.bin", size=len(BODY))


def test_a_connection_cut_again_and_again_is_resumed_where_it_ended(tmp_path):
    with Server({"/a.bin": BODY}, cut=CHUNK) as server:
        path = download(server.address + "/a.bin", tmp_path / "a.bin", wait=0)
        asked = [range_ for _, range_ in server.log]
    assert path.read_bytes() == BODY
    assert asked == [None] + [f"bytes={i * CHUNK}-" for i in (1, 2, 3)]


def test_a_part_left_by_a_killed_run_is_gone_on_from(tmp_path):
    (tmp_path / "a.bin.part").write_bytes(BODY[:1000])
    with Server({"/a.bin": BODY}) as server:
        path = download(server.address + "/a.bin", tmp_path / "a.bin")
        assert server.log == [("/a.bin", "bytes=1000-")]
    assert path.read_bytes() == BODY


def test_a_redirected_download_is_gone_on_from(tmp_path):  # the hub redirects large files
    (tmp_path / "a.bin.part").write_bytes(BODY[:1000])
    with Server({"/b.bin": BODY}, moved={"/a.bin": "/b.bin"}) as server:
        path = download(server.address + "/a.bin", tmp_path / "a.bin")
        assert server.log[1] == ("/b.bin", "bytes=1000-")
    assert path.read_bytes() == BODY


def test_a_complete_part_needs_no_further_byte(tmp_path):
    (tmp_path / "a.bin.part").write_bytes(BODY)
    with Server({"/a.bin": BODY}) as server:
        assert download(server.address + "/a.bin", tmp_path / "a.bin").read_bytes() == BODY
        assert len(server.log) == 1


def test_a_part_longer_than_the_file_starts_over(tmp_path):
    (tmp_path / "a.bin.part").write_bytes(BODY + b"more")
    with Server({"/a.bin": BODY}) as server:
        path = download(server.address + "/a.bin", tmp_path / "a.bin", wait=0)
    assert path.read_bytes() == BODY


def test_a_server_that_ignores_range_starts_over(tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    with Server({"/a.bin": BODY}, ranges=False) as server:
        path = download(server.address + "/a.bin", tmp_path / "a.bin")
    assert path.read_bytes() == BODY


def test_a_server_without_progress_is_given_up_and_the_part_stays(tmp_path):
    with Server({"/a.bin": BODY}, cut=10, ranges=False) as server:
        with pytest.raises(ValueError, match="gave up after 6 attempts .* from byte 10"):
            download(server.address + "/a.bin", tmp_path / "a.bin", wait=0)
    assert (tmp_path / "a.bin.part").read_bytes() == BODY[:10]


def test_a_busy_server_is_asked_again(tmp_path):
    with Server({"/a.bin": b"abc"}, fail={"/a.bin": [503, 429]}) as server:
        path = download(server.address + "/a.bin", tmp_path / "a.bin", wait=0)
        assert path.read_bytes() == b"abc"
        assert len(server.log) == 3


def test_a_server_that_falls_silent_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.download.TIMEOUT", 0.1)
    with Server({"/a.bin": b"abc"}, pauses=[0.3]) as server:
        path = download(server.address + "/a.bin", tmp_path / "a.bin", wait=0)
        assert path.read_bytes() == b"abc"
        assert len(server.log) == 2


def test_a_missing_file_is_not_asked_for_twice(tmp_path):
    with Server({}) as server:
        with pytest.raises(FileNotFoundError, match="no such file"):
            download(server.address + "/a.bin", tmp_path / "a.bin")
        assert len(server.log) == 1


def test_a_refusal_says_what_to_do(tmp_path):
    with Server({"/a.bin": b"abc"}, fail={"/a.bin": [403]}) as server:
        with pytest.raises(ValueError, match="refuses .403 Forbidden.; if it wants an account"):
            download(server.address + "/a.bin", tmp_path / "a.bin")


def test_another_size_than_expected_is_refused_before_any_byte_is_kept(tmp_path):
    with Server({"/a.bin": BODY}) as server:
        with pytest.raises(ValueError, match=f"is {len(BODY)} bytes long there, expected 5"):
            download(server.address + "/a.bin", tmp_path / "a.bin", size=5)
    assert list(tmp_path.iterdir()) == []


def test_wrong_bytes_of_the_right_size_are_removed(tmp_path):
    with Server({"/a.bin": b"abc"}) as server:
        with pytest.raises(ValueError, match="sha256 is ba7816bf.* expected 00"):
            download(server.address + "/a.bin", tmp_path / "a.bin", size=3, sha256="00" * 32)
    assert list(tmp_path.iterdir()) == []


def test_a_file_already_there_with_another_size_is_not_overwritten(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match="has 4 bytes, expected 5; remove it"):
        download("http://127.0.0.1:1/a.bin", tmp_path / "a.bin", size=5)
    assert (tmp_path / "a.bin").read_bytes() == b"mine"


def test_a_listing_of_several_pages_is_read_to_its_end():
    files = {f"/datasets/o/n/resolve/main/data/{i}.parquet": bytes([i]) for i in range(5)}
    with Server(files, page=2) as server:
        found = hub_files(server.address + "/datasets/o/n")
    assert [file.path for file in found] == [f"data/{i}.parquet" for i in range(5)]
    assert found[3].size == 1 and found[3].sha256 == hashlib.sha256(b"\3").hexdigest()
    assert found[3].url.endswith("/datasets/o/n/resolve/main/data/3.parquet")


def test_an_address_that_is_no_data_set_is_refused():
    with pytest.raises(ValueError, match="write https://huggingface.co/datasets/OWNER/NAME"):
        hub_files("https://huggingface.co/some/model")


# ------------------------------------------------------------------------------------------ NIGHTS

HEADER = ("id,left_vote,right_vote,votes,ref_path,left_path,right_path,split,is_imagenet,prompt\n")


def nights_csv(splits=("train", "train", "val", "test")):
    """NIGHTS' table with one triplet a split named; the last has too few votes to count."""
    rows = [f"{i},1,0,{6 + i},ref/000/{i:03d}.png,distort/000/{i:03d}_0.png,"
            f"distort/000/{i:03d}_1.png,{split},False,a dog\n" for i, split in enumerate(splits)]
    last = len(splits)
    rows.append(f"{last},0,1,5,ref/000/000.png,distort/000/000_0.png,distort/000/000_1.png,train,"
                "True,a cat\n")
    return HEADER + "".join(rows)


def nights_zip(path, extra=(), leave_out=(), home="nights/"):
    """A small zip as published: everything below nights/; extra: (name or ZipInfo, bytes)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{home}data.csv", nights_csv())
        for i in range(4):
            for name in (f"ref/000/{i:03d}.png", f"distort/000/{i:03d}_0.png",
                         f"distort/000/{i:03d}_1.png"):
                if name not in leave_out:
                    file.writestr(home + name, f"picture {name}".encode() * 50)
        for name, content in extra:
            file.writestr(name, content)
    return path


COUNTS = {"train": 2, "val": 1, "test": 1}


def test_nights_is_fetched_unpacked_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_nights, "COUNTS", COUNTS)
    with Server({"/n.zip": nights_zip(tmp_path / "n.zip").read_bytes()}) as server:
        prepare_nights.main([str(tmp_path / "nights"), f"--url={server.address}/n.zip"])
    picture = tmp_path / "nights" / "distort" / "000" / "003_1.png"
    assert picture.read_bytes() == b"picture distort/000/003_1.png" * 50
    assert sorted(p.name for p in (tmp_path / "nights").iterdir()) == ["data.csv", "distort", "ref"]


def test_a_stopped_unpacking_is_gone_on_from_and_writes_the_csv_last(tmp_path, monkeypatch):
    archive, written = nights_zip(tmp_path / "n.zip"), []

    def stop_at_five(source, target):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(target)
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_nights.os, "replace", stop_at_five)
        with pytest.raises(KeyboardInterrupt):
            prepare_nights.extract(archive, tmp_path / "nights")
    assert not (tmp_path / "nights" / "data.csv").exists()
    times = [path.stat().st_mtime_ns for path in written]
    prepare_nights.extract(archive, tmp_path / "nights")
    assert [path.stat().st_mtime_ns for path in written] == times
    prepare_nights.check(tmp_path / "nights", COUNTS)


def test_a_folder_of_other_things_gets_no_download(tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ValueError, match="has files, but no data.csv"):
        prepare_nights.main([str(tmp_path), "--url=http://127.0.0.1:1/n.zip"])


def link_member():
    info = zipfile.ZipInfo("nights/ref/link.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize("name", ["../outside.png", "/tmp/outside.png", "nights/../../outside.png",
                                  "C:\\outside.png", "nights\\..\\..\\outside.png", "link"])
def test_a_zip_with_a_member_that_leaves_the_folder_is_not_unpacked(tmp_path, name):
    member = link_member() if name == "link" else name
    archive = nights_zip(tmp_path / "n.zip", extra=[(member, b"/etc/passwd")])
    with pytest.raises(ValueError, match="is a link or leaves the folder"):
        prepare_nights.extract(archive, tmp_path / "deep" / "nights")
    assert [path.name for path in tmp_path.rglob("*")] == ["n.zip"]


def test_members_beside_the_data_sets_folder_stay_in_the_zip(tmp_path):
    archive = nights_zip(tmp_path / "n.zip", extra=[("__MACOSX/x.png", b"x")])
    prepare_nights.extract(archive, tmp_path / "nights")
    assert not list(tmp_path.rglob("__MACOSX"))


def test_a_damaged_zip_is_named(tmp_path):
    archive = nights_zip(tmp_path / "n.zip")
    content = bytearray(archive.read_bytes())
    content[content.index(b"003_1.png") + 20] ^= 255  # in the compressed bytes of that member
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="n.zip: broken"):
        prepare_nights.extract(archive, tmp_path / "nights")
    archive.write_bytes(b"<html>busy</html>")
    with pytest.raises(ValueError, match="n.zip: broken .*remove it and start again"):
        prepare_nights.extract(archive, tmp_path / "nights")


def test_a_zip_without_the_csv_is_not_nights(tmp_path):
    with zipfile.ZipFile(tmp_path / "n.zip", "w") as file:
        file.writestr("a.png", b"")
    with pytest.raises(ValueError, match="holds no data.csv"):
        prepare_nights.extract(tmp_path / "n.zip", tmp_path / "nights")


def test_missing_pictures_are_counted_and_the_first_ten_named(tmp_path):
    names = [f"distort/000/{i:03d}_{side}.png" for i in range(4) for side in (0, 1)]
    gone = names + ["ref/000/001.png", "ref/000/002.png", "ref/000/003.png"]
    prepare_nights.extract(nights_zip(tmp_path / "n.zip", leave_out=gone), tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        prepare_nights.check(tmp_path, COUNTS)
    assert "11 of 12 pictures missing: " + ", ".join(gone[:10]) + ", ...;" in str(error.value)


def test_other_counts_than_published_are_refused(tmp_path):
    prepare_nights.extract(nights_zip(tmp_path / "n.zip"), tmp_path / "nights")
    with pytest.raises(ValueError, match="'train': 2, 'val': 1, 'test': 1}, NIGHTS has .*13900"):
        prepare_nights.main([str(tmp_path / "nights")])


# -------------------------------------------------------------------------------------- benchmarks

def png(value):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def hub_set(folder, home, name, n, classes, retrieval=False):
    """The files {path on the server: bytes} of one set as a home has it."""
    captions = ["a thing", "one thing"]
    samples = [(f"s{i:07d}", "png", png(i), captions if retrieval else i % classes)
               for i in range(n)]
    kind = "retrieval" if retrieval else "classification"
    made = write_set(folder, "made", [f"c{i}" for i in range(classes)], ["a {c}."],
                                samples, dataset_type=kind, per_shard=3)
    files = {f"/datasets/{home}/{name}/resolve/main/{path.relative_to(made)}": path.read_bytes()
             for path in Path(made).rglob("*.t*")}
    return files | {f"/datasets/{home}/{name}/resolve/main/README.md": b"# read me"}


def small_row(name, n, classes, retrieval=False):
    family = "retrieval" if retrieval else "misc"
    return benchmarks.Row(name, family, (name, f"other-{name}"), n, classes, "acc1", 1, (0.0, 0.0))


@pytest.fixture
def rows(monkeypatch):
    """A table of two small rows instead of the paper's."""
    table = (small_row("tiny", 8, 2), small_row("pairs", 4, 0, retrieval=True))
    monkeypatch.setattr(prepare_benchmarks, "ROWS", table)
    monkeypatch.setattr(benchmarks, "ROWS", table)
    monkeypatch.setattr(benchmarks, "ROW_OF", {name: row for row in table for name in row.sets})
    return table


def fetch_sets(server, target, *options):
    prepare_benchmarks.main([str(target), f"--hub={server.address}", *options])


def test_a_set_is_fetched_whole_and_read_by_the_evaluator(tmp_path, rows):
    with Server(hub_set(tmp_path, "djghosh", "wds_tiny_test", 8, 2)) as server:
        fetch_sets(server, tmp_path / "sets", "--only=tiny")
    folder = tmp_path / "sets" / "wds_tiny_test"
    assert benchmarks.BenchmarkSet(folder).labels.tolist() == [0, 1] * 4
    assert not (folder / "README.md").exists()


def test_a_complete_set_costs_one_listing_and_no_file(tmp_path, rows):
    with Server(hub_set(tmp_path, "djghosh", "wds_tiny_test", 8, 2)) as server:
        fetch_sets(server, tmp_path / "sets", "--only=tiny")
        server.log.clear()
        fetch_sets(server, tmp_path / "sets", "--only=tiny")
        assert [path for path, _ in server.log] == [
            "/api/datasets/djghosh/wds_tiny_test/tree/main?recursive=true"]


def test_the_other_home_has_its_own_names_and_retrieval_sets(tmp_path, rows):
    files = hub_set(tmp_path / "a", "clip-benchmark", "wds_other-tiny", 8, 2)
    files |= hub_set(tmp_path / "b", "clip-benchmark", "wds_other-pairs", 4, 0, retrieval=True)
    with Server(files) as server:
        fetch_sets(server, tmp_path / "sets", "--only=other-tiny", "--home=clip-benchmark")
        fetch_sets(server, tmp_path / "sets", "--only=pairs")  # wherever asked, it is in that home
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == [
        "wds_other-pairs", "wds_other-tiny"]


def test_one_set_never_comes_from_two_homes(tmp_path, rows):
    (tmp_path / "sets" / "wds_other-tiny").mkdir(parents=True)
    with Server({}) as server:
        with pytest.raises(ValueError, match="same set from the other home; move it away"):
            fetch_sets(server, tmp_path / "sets", "--only=tiny")


def test_a_set_of_another_size_than_its_row_is_refused_and_the_rest_still_fetched(tmp_path, rows):
    files = hub_set(tmp_path / "a", "djghosh", "wds_tiny_test", 7, 2)
    files |= hub_set(tmp_path / "b", "clip-benchmark", "wds_other-pairs", 4, 0, retrieval=True)
    with Server(files) as server:
        with pytest.raises(ValueError, match="1 of 2 sets failed: tiny .*7 images in 2 classes, "
                                             "but tiny has 8 in 2"):
            fetch_sets(server, tmp_path / "sets")
    assert (tmp_path / "sets" / "wds_other-pairs" / "test" / "1.tar").exists()


def test_the_list_says_what_is_complete_incomplete_and_absent(tmp_path, rows, capsys):
    with Server(hub_set(tmp_path, "djghosh", "wds_tiny_test", 8, 2)) as server:
        fetch_sets(server, tmp_path / "sets", "--only=tiny")
    prepare_benchmarks.main([str(tmp_path / "sets"), "--list"])
    complete = capsys.readouterr().out
    (tmp_path / "sets" / "wds_tiny_test" / "test" / "1.tar").unlink()
    prepare_benchmarks.main([str(tmp_path / "sets"), "--list"])
    assert "complete, 0 MB" in complete and "absent" in complete
    assert "INCOMPLETE" in capsys.readouterr().out


def test_the_list_without_any_folder_shows_all_rows_of_the_paper(capsys):
    prepare_benchmarks.main(["nowhere", "--list"])
    out = capsys.readouterr().out
    assert out.count("absent") == 32 and "vtab-clevr_closest_object_distance" in out


def test_an_unknown_set_gets_the_nearest_name():
    with pytest.raises(ValueError, match="--only=cifar: no such set; did you mean cifar10?"):
        prepare_benchmarks.main(["nowhere", "--only=cifar"])


def write_idx(path, array):
    head = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(head + array.tobytes()))


def test_fashion_mnist_becomes_a_set_with_its_pixels_and_labels(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (12, 28, 28), dtype=np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 10
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    prepare_benchmarks.main(["fashion-mnist", str(tmp_path), str(tmp_path / "sets")])
    made = benchmarks.BenchmarkSet(tmp_path / "sets" / "wds_fashion_mnist_test")
    assert made.labels.tolist() == labels.tolist()
    assert np.array_equal(np.asarray(made.image(11).convert("L")), images[11])


def test_a_cut_idx_file_is_named(tmp_path):
    write_idx(tmp_path / "a.gz", np.zeros((3, 2, 2), np.uint8))
    content = gzip.decompress((tmp_path / "a.gz").read_bytes())
    (tmp_path / "a.gz").write_bytes(gzip.compress(content[:-1]))
    with pytest.raises(ValueError, match="11 bytes of data, its head says .3 2 2."):
        prepare_benchmarks.read_idx(tmp_path / "a.gz")


# ----------------------------------------------------------------------------------------- YFCC15M

@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """The path of a vocabulary of bytes alone, without a merge: 512 ranks, start 512, end 513."""
    pieces = [bytes([i]) for i in range(256)] + [bytes([i, 0]) for i in range(256)]
    path = tmp_path_factory.mktemp("vocabulary") / "bytes.tiktoken"
    path.write_text("".join(f"{base64.b64encode(piece).decode()} {rank}\n"
                            for rank, piece in enumerate(pieces)))
    return path


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return Tokenizer(vocabulary)


def photo(seed, size=(24, 20)):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_parquet(path, images, texts):
    pa = pytest.importorskip("pyarrow", reason="parquet files are written with pyarrow")
    from pyarrow import parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"images": pa.array(images, pa.binary()),
                                  "texts": pa.array(texts, pa.list_(pa.int64()))}), path)


@pytest.fixture
def release(tmp_path, tokenizer):
    """Three parquet files of 20 good rows each, as the release has them."""
    for i in range(3):
        texts = [tokenizer(f"photo {row} of file {i}")[0].tolist() for row in range(20)]
        write_parquet(tmp_path / "release" / f"train-{i:05d}-of-00003.parquet",
                      [photo(100 * i + row) for row in range(20)], texts)
    return tmp_path / "release"


def prepare(source, target, vocabulary, *options):
    prepare_yfcc15m.main([str(source), str(target), f"--vocabulary={vocabulary}", "--workers=1",
                          *options])
    return json.loads((target / "report.json").read_text())


def tars(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_each_parquet_file_becomes_the_shard_of_its_name(release, tmp_path, vocabulary):
    report = prepare(release, tmp_path / "out", vocabulary)
    assert sorted(tars(tmp_path / "out")) == [f"train-{i:05d}-of-00003.tar" for i in range(3)]
    index_shards(tmp_path / "out")
    image, captions = Shards(tmp_path / "out")[21]
    assert image == photo(101) and captions == ["photo 1 of file 1"]
    assert report == {"files": 3, "rows": 60, "captions": 60, "pairs": 60,
                      prepare_yfcc15m.DIFFERENT: 0}


def test_two_processes_fetch_and_convert_what_one_converts(release, tmp_path, vocabulary):
    head = "/datasets/o/n/resolve/main/data/"
    files = {head + path.name: path.read_bytes() for path in release.iterdir()}
    with Server(files | {"/datasets/o/n/resolve/main/README.md": b"#"}, page=2) as server:
        prepare(f"{server.address}/datasets/o/n", tmp_path / "remote", vocabulary, "--workers=2")
    prepare(release, tmp_path / "local", vocabulary)
    assert tars(tmp_path / "remote") == tars(tmp_path / "local")
    assert list((tmp_path / "remote" / "fetched").iterdir()) == []


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(release, tmp_path, vocabulary):
    prepare(release, tmp_path / "whole", vocabulary)
    code = ("import os, sys; from data.prepare import yfcc15m as p\n"
            "seen, shrink = [], p.shrink\n"
            "def dying(*args, **kw):\n"
            "    seen.append(1)\n"
            "    return shrink(*args, **kw) if len(seen) < 30 else os.kill(os.getpid(), 9)\n"
            "p.shrink = dying; p.main(sys.argv[1:])")
    command = [sys.executable, "-c", code, str(release), str(tmp_path / "out"),
               f"--vocabulary={vocabulary}", "--workers=1"]
    assert subprocess.run(command, timeout=60, capture_output=True).returncode == -9
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left[:2] == ["done", "train-00000-of-00003.tar"] and len(left) == 3  # and a .tmp
    first = (tmp_path / "out" / "train-00000-of-00003.tar").stat().st_mtime_ns
    prepare(release, tmp_path / "out", vocabulary)
    assert tars(tmp_path / "out") == tars(tmp_path / "whole")
    assert (tmp_path / "out" / "train-00000-of-00003.tar").stat().st_mtime_ns == first
    assert not list((tmp_path / "out").glob("*.tmp"))


def row_of(tokenizer, *captions, zeros=0):
    return [i for text in captions for i in tokenizer(text)[0].tolist()] + [0] * 77 * zeros


def changed(tokenizer, position, value):
    row = row_of(tokenizer, "a dog")
    row[position] = value
    return row


def test_rows_of_77_154_and_231_ids_are_one_two_and_three_captions(tokenizer):
    counts = Counter()
    rows = [row_of(tokenizer, "a dog"), row_of(tokenizer, "a dog", "a pet"),
            row_of(tokenizer, "a dog", "a pet", zeros=1), row_of(tokenizer, "a", "b", "c")]
    found = [prepare_yfcc15m.read_captions(row, tokenizer, counts) for row in rows]
    assert found == [["a dog"], ["a dog", "a pet"], ["a dog", "a pet"], ["a", "b", "c"]]
    assert counts == {"captions": 8, prepare_yfcc15m.DIFFERENT: 0}


def test_a_caption_cut_at_77_ids_without_an_end_is_read_to_its_last_id(tokenizer):
    ids = np.array([tokenizer.start] + tokenizer.encode(["a" + " dog" * 25])[0][:76])
    text, same = prepare_yfcc15m.read_caption(ids, tokenizer)
    assert text == "a" + " dog" * 25 and same


def test_every_bad_row_is_counted_and_named(tmp_path, tokenizer, vocabulary):
    good = row_of(tokenizer, "a dog")
    bad = {"token row is not k x 77 ids": [good[:76], [], None, good + good[:1]],
           "token id missing": [changed(tokenizer, 3, None)],
           "token id out of range": [changed(tokenizer, 2, 514), changed(tokenizer, 2, -1)],
           "wrong first token id": [changed(tokenizer, 0, 5)],
           "token ids after the end": [changed(tokenizer, 70, 9)],
           "empty caption": [row_of(tokenizer, ""), row_of(tokenizer, zeros=1)]}
    texts = [good] * 200 + [row for rows in bad.values() for row in rows]
    images = [photo(0)] * len(texts)
    images[3:6] = [None, b"<html>", photo(1, (300, 300))[:9000]]
    texts[7] = row_of(tokenizer, "a dog") + changed(tokenizer, 0, 5)  # one caption of two is bad
    texts[8] = changed(tokenizer, 4, ord("g"))  # without the mark of a word's end: cut within it
    write_parquet(tmp_path / "in" / "a.parquet", images, texts)
    report = prepare(tmp_path / "in", tmp_path / "out", vocabulary)
    done = json.loads((tmp_path / "out" / "done" / "a.json").read_text())
    assert done["skipped"] == {reason: len(rows) for reason, rows in bad.items()} | {
        "empty": 1, "not an image": 1, "truncated": 1}
    assert done["examples"]["token id out of range"] == [205, 206]
    assert (report["rows"], report["pairs"], report[prepare_yfcc15m.DIFFERENT]) == (211, 197, 1)
    assert report["dropped caption: wrong first token id"] == 1
    index_shards(tmp_path / "out")
    names = [Shards(tmp_path / "out").name(i) for i in (2, 3)]
    assert names == ["a.tar:a_000002", "a.tar:a_000006"]


def test_another_vocabulary_fails_the_file_and_leaves_no_shard(release, tmp_path, vocabulary):
    text = vocabulary.read_text() + base64.b64encode(b"do").decode() + " 512\n"  # start is now 513
    (tmp_path / "other.tiktoken").write_text(text)
    with pytest.raises(ValueError, match="1 of 1 files failed.*wrong first token id': 20"):
        prepare(release, tmp_path / "out", tmp_path / "other.tiktoken", "--files=1")
    assert tars(tmp_path / "out") == {}


def test_a_broken_parquet_file_fails_alone(release, tmp_path, vocabulary):
    broken = release / "train-00001-of-00003.parquet"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(ValueError, match="1 of 3 files failed, the first: train-00001-of-00003: "):
        prepare(release, tmp_path / "out", vocabulary)
    assert sorted(tars(tmp_path / "out")) == ["train-00000-of-00003.tar",
                                              "train-00002-of-00003.tar"]


def test_other_columns_are_named(tmp_path, vocabulary):
    pa = pytest.importorskip("pyarrow", reason="parquet files are written with pyarrow")
    from pyarrow import parquet
    (tmp_path / "in").mkdir()
    parquet.write_table(pa.table({"image": [b""], "caption": ["a"]}), tmp_path / "in" / "a.parquet")
    with pytest.raises(ValueError, match="columns are {'image': 'binary', 'caption': 'string'}"):
        prepare(tmp_path / "in", tmp_path / "out", vocabulary)


def test_a_folder_without_parquet_files_is_named(tmp_path, vocabulary):
    with pytest.raises(FileNotFoundError, match="no such folder, or no .parquet file in it"):
        prepare(tmp_path / "nowhere", tmp_path / "out", vocabulary)


def test_without_pyarrow_one_line_says_what_to_install(release, tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        prepare(release, tmp_path / "out", vocabulary)


# ---------------------------------------------------------------------------------------- progress

def test_progress_gives_the_rate_since_the_first_unit_and_the_time_left(monkeypatch, capsys):
    clock = iter([0.0, 100.0, 100.0, 120.0, 120.0])  # made; the first unit after 100 s; +20 s
    monkeypatch.setattr("data.log.time.monotonic", lambda: next(clock))
    line = Progress("files", 16, "files", done=5)
    monkeypatch.setattr("data.log._EVERY", 1e9)
    line.add()
    monkeypatch.setattr("data.log._EVERY", 0)
    line.add(2)
    assert capsys.readouterr().out == ("files: 8 of 16 files (50%), 0.1 files/s, eta 1.3 min\n")
