"""The preparation of published data: a loopback server that plays the hub, parquet files, zips."""
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
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import benchmarks
from data.log import Progress
from data.prepare import benchmarks as prepare_benchmarks
from data.prepare import hub
from data.prepare import nights as prepare_nights
from data.prepare import vocabulary as prepare_vocabulary
from data.prepare import yfcc15m as prepare_yfcc15m
from data.prepare.tars import write_set
from data.shards import Shards, index_shards
from data.text import Tokenizer

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Hub(http.server.ThreadingHTTPServer):
    """What the library asks of the Hugging Face hub, on the loopback device.

    files: {"OWNER/NAME/path": bytes}; gated: {"OWNER/NAME": token that opens it};
    busy: replies of 429 before the next ones are given; cut: bytes after which the next reply with
    a file ends, though it promised more; log: (method, path, Range header) of each request.
    """

    def __init__(self, files, gated=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.gated, self.log, self.busy, self.cut = files, gated or {}, [], 0, None
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def fetched(self):
        """Paths of the files that were sent."""
        return [path for method, path, _ in self.log if method == "GET" and "/resolve/" in path]


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, hub = self.path.partition("?")[0], self.server
        hub.log.append((self.command, path, self.headers.get("Range")))
        if hub.busy:
            hub.busy -= 1
            return self.reply(429, headers={"Retry-After": "0"})
        parts = path.removeprefix("/api").split("/")  # "", "datasets", owner, name, ...
        name = "/".join(parts[2:4])
        known = {"/".join(file.split("/")[:2]) for file in hub.files}
        if name not in known:
            return self.reply(401, headers={"X-Error-Code": "RepoNotFound"})
        if name in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.gated[name]}":
            return self.reply(403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message":
                                            f"Access to dataset {name} is restricted."})
        if path.startswith("/api/"):
            return self.reply(200, json.dumps(self.listing(name)).encode())
        body = hub.files.get(f"{name}/{'/'.join(parts[6:])}")
        if body is None:
            return self.reply(404, headers={"X-Error-Code": "EntryNotFound"})
        begin = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        self.reply(206 if begin else 200, body[begin:], headers)

    def listing(self, name):
        files = {file.removeprefix(name + "/"): body for file, body in self.server.files.items()
                 if file.startswith(name + "/")}
        return {"id": name, "sha": COMMIT, "private": False, "downloads": 0, "likes": 0, "tags": [],
                "siblings": [{"rfilename": path, "size": len(body)} for path, body in files.items()]}

    def reply(self, status, body=b"", headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            cut = self.server.cut if "X-Repo-Commit" in (headers or {}) else None
            self.wfile.write(body[:cut])
            if cut is not None:
                self.server.cut = None
                self.close_connection = True


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """A function of files and gates that starts a Hub, to which the library then goes."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="pip install huggingface_hub")
    started = []

    def start(files, gated=None):
        server = Hub(files, gated).__enter__()
        started.append(server)
        monkeypatch.setenv("HF_ENDPOINT", server.address)  # read at import: for new processes
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            server.address + "/{repo_id}/resolve/{revision}/{filename}")
        return server

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield start
    for server in started:
        server.__exit__()


# --------------------------------------------------------------------------------------------- hub

BODY = np.random.default_rng(0).bytes(100_000)


def command(*arguments, **environment):
    """Run a command of ours as a user does; returns (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True,
                          timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    return done.returncode, done.stdout, done.stderr


def test_a_data_set_is_listed_with_its_commit_and_sizes(serve):
    serve({"o/n/a/1.tar": BODY, "o/n/README.md": b"# n", "o/other/x": b""})
    assert hub.list_files("o/n") == (COMMIT, {"a/1.tar": len(BODY), "README.md": 3})


def test_a_fetched_file_is_whole_and_costs_nothing_the_second_time(serve, tmp_path):
    server = serve({"o/n/a/1.tar": BODY})
    path = hub.fetch_file("o/n", COMMIT, "a/1.tar", tmp_path / "to")
    assert path.read_bytes() == BODY and path.resolve() == (tmp_path / "to" / "a" / "1.tar")
    server.log.clear()
    assert hub.fetch_file("o/n", COMMIT, "a/1.tar", tmp_path / "to") == path and not server.log


def test_a_connection_that_was_cut_is_gone_on_from(serve, tmp_path):
    server = serve({"o/n/1.tar": BODY})
    server.cut = 60_000
    assert hub.fetch_file("o/n", COMMIT, "1.tar", tmp_path).read_bytes() == BODY
    assert len(server.fetched()) == 2


def test_a_busy_hub_is_asked_again(serve, tmp_path):
    server = serve({"o/n/1.tar": BODY})
    server.busy = 2
    assert hub.fetch_file("o/n", COMMIT, "1.tar", tmp_path).read_bytes() == BODY


def test_a_gated_set_is_opened_by_the_token(serve, tmp_path, monkeypatch):
    serve({"o/n/1.tar": BODY}, gated={"o/n": "hf_secret"})
    with pytest.raises(ValueError, match="data set o/n on the hub: 403.*Access to dataset o/n is restricted"):
        hub.list_files("o/n")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert hub.list_files("o/n")[1] == {"1.tar": len(BODY)}
    assert hub.fetch_file("o/n", COMMIT, "1.tar", tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("address", ["https://huggingface.co/some/model", "kaichengalex", "a/b/c", ""])
def test_an_address_that_is_no_data_set_is_refused(address):
    with pytest.raises(ValueError, match="write OWNER/NAME, or https://huggingface.co/datasets/OWNER/"):
        hub.dataset_name(address)


def test_the_address_of_a_data_set_and_its_name_are_the_same():
    for address in ("o/n", "https://huggingface.co/datasets/o/n", "http://mirror/datasets/o/n/"):
        assert hub.dataset_name(address) == "o/n"


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        hub.list_files("o/n")


def test_what_the_hub_refuses_is_one_line_and_exit_code_2(serve, tmp_path, vocabulary):
    server = serve({"o/gated/a.parquet": b""}, gated={"o/gated": "secret"})
    for name, reason in (("o/none", "Repository Not Found"), ("o/gated", "restricted")):
        code, _, said = command("data.prepare.yfcc15m", name, tmp_path / "out",
                                f"--vocabulary={vocabulary}", HF_ENDPOINT=server.address)
        assert code == 2 and reason in said and said.count("\n") == 1
    code, _, said = command("data.prepare.yfcc15m", "o/none", tmp_path / "out",
                            f"--vocabulary={vocabulary}", HF_ENDPOINT="http://127.0.0.1:1")
    assert code == 2 and said.startswith("yfcc15m.py: data set o/none on the hub: ")
    assert said.count("\n") == 1


# -------------------------------------------------------------------------------------- vocabulary

MERGES = "#version: 0.2\na b</w>\n\u0120 c"  # U+0120 stands for the blank


@pytest.fixture
def merges(tmp_path, monkeypatch):
    """A merges file of two merges that passes for CLIP's."""
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress(MERGES.encode()))
    monkeypatch.setattr(prepare_vocabulary, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_merges_of_a_file_or_an_address_become_a_vocabulary(merges, tmp_path, monkeypatch):
    prepare_vocabulary.main([str(tmp_path / "deep" / "a.tiktoken"), f"--merges={merges}"])
    lines = (tmp_path / "deep" / "a.tiktoken").read_text().splitlines()
    assert lines[512:] == [f"{base64.b64encode(b'ab' + bytes(1)).decode()} 512",
                           f"{base64.b64encode(b' c').decode()} 513"]
    asked = []
    monkeypatch.setattr("urllib.request.urlopen",
                        lambda url, timeout: asked.append(url) or open(merges, "rb"))
    assert prepare_vocabulary.read_merges(prepare_vocabulary.URL) == MERGES
    assert asked == [prepare_vocabulary.URL]


def test_an_address_that_fails_says_how_to_go_on():
    with pytest.raises(ValueError, match="get https.* otherwise, give --merges=FILE"):
        prepare_vocabulary.read_merges("https://127.0.0.1:1/merges.gz")


def test_a_file_of_others_where_the_target_stands_is_not_overwritten(merges):
    before = merges.read_bytes()
    with pytest.raises(ValueError, match="given with --merges=FILE"):
        prepare_vocabulary.main([str(merges), f"--merges={merges}"])
    assert merges.read_bytes() == before


def test_a_vocabulary_that_is_there_may_be_made_again(merges, tmp_path):
    for _ in range(2):
        prepare_vocabulary.main([str(tmp_path / "a.tiktoken"), f"--merges={merges}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tiktoken", "merges.txt.gz"]


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


def test_nights_is_unpacked_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_nights, "COUNTS", COUNTS)
    archive = nights_zip(tmp_path / "n.zip")
    prepare_nights.main([str(tmp_path / "nights"), f"--zip={archive}"])
    picture = tmp_path / "nights" / "distort" / "000" / "003_1.png"
    assert picture.read_bytes() == b"picture distort/000/003_1.png" * 50
    assert sorted(p.name for p in (tmp_path / "nights").iterdir()) == ["data.csv", "distort", "ref"]
    assert archive.exists() and "n.zip is unpacked and may be deleted" in capsys.readouterr().out


def test_the_zip_in_the_folder_is_found_and_a_finished_folder_needs_none(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_nights, "COUNTS", COUNTS)
    nights_zip(tmp_path / "nights.zip")
    prepare_nights.main([str(tmp_path)])
    (tmp_path / "nights.zip").unlink()
    prepare_nights.main([str(tmp_path)])


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


def test_a_missing_zip_says_how_to_fetch_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nights.zip: no such file; `curl -C - -o .*nights.zip"):
        prepare_nights.main([str(tmp_path / "nights")])


def test_after_a_full_disk_the_next_run_goes_on(tmp_path, monkeypatch):
    archive = nights_zip(tmp_path / "n.zip")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", full_disk)
        with pytest.raises(OSError, match="No space left on device"):
            prepare_nights.extract(archive, tmp_path / "nights")
    prepare_nights.extract(archive, tmp_path / "nights")
    prepare_nights.check(tmp_path / "nights", COUNTS)


def test_a_file_of_another_size_is_unpacked_again(tmp_path):
    cut = tmp_path / "nights" / "ref" / "000" / "001.png"
    cut.parent.mkdir(parents=True)
    cut.write_bytes(b"pict")
    prepare_nights.extract(nights_zip(tmp_path / "n.zip"), tmp_path / "nights")
    assert cut.read_bytes() == b"picture ref/000/001.png" * 50


def full_disk(*_):
    raise OSError(28, "No space left on device")


def link_member():
    info = zipfile.ZipInfo("nights/ref/link.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize("name", ["../outside.png", "/tmp/outside.png", "nights/../../outside.png",
                                  "C:\\outside.png", "nights\\..\\..\\outside.png", "link"])
def test_no_member_of_a_zip_leaves_the_folder_or_becomes_a_link(tmp_path, name):
    member = link_member() if name == "link" else name
    archive = nights_zip(tmp_path / "n.zip", extra=[(member, b"/etc/passwd")])
    folder = tmp_path / "deep" / "nights"
    prepare_nights.extract(archive, folder)
    prepare_nights.check(folder, COUNTS)
    outside = [path for path in tmp_path.rglob("*") if not path.is_relative_to(folder)]
    assert sorted(path.name for path in outside) == ["deep", "n.zip"]
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert not Path("/tmp/outside.png").exists()


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
    assert not (tmp_path / "nights" / "distort" / "000" / "003_1.png").exists()
    archive.write_bytes(b"<html>busy</html>")
    with pytest.raises(ValueError, match="n.zip: broken .*remove it and fetch it again"):
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
    assert ("11 of 12 pictures missing, the first: " + ", ".join(gone[:10]) + ";"
            in str(error.value))


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
    made = write_set(folder, "made", [f"c{i}" for i in range(classes)], ["a {c}."], samples,
                     dataset_type=kind, per_shard=3)
    files = {f"{home}/{name}/{path.relative_to(made)}": path.read_bytes()
             for path in Path(made).rglob("*.t*")}
    return files | {f"{home}/{name}/README.md": b"# read me"}


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


def fetch_sets(target, *options):
    prepare_benchmarks.main([str(target), *options])


def test_a_set_is_fetched_whole_and_read_by_the_evaluator(tmp_path, rows, serve):
    serve(hub_set(tmp_path, "djghosh", "wds_tiny_test", 8, 2))
    fetch_sets(tmp_path / "sets", "--only=tiny")
    folder = tmp_path / "sets" / "wds_tiny_test"
    assert benchmarks.BenchmarkSet(folder).labels.tolist() == [0, 1] * 4
    assert not (folder / "README.md").exists()


def test_a_complete_set_costs_one_listing_and_no_file(tmp_path, rows, serve):
    server = serve(hub_set(tmp_path, "djghosh", "wds_tiny_test", 8, 2))
    fetch_sets(tmp_path / "sets", "--only=tiny")
    server.log.clear()
    fetch_sets(tmp_path / "sets", "--only=tiny")
    assert [path for _, path, _ in server.log] == ["/api/datasets/djghosh/wds_tiny_test"]


def test_the_other_home_has_its_own_names_and_retrieval_sets(tmp_path, rows, serve):
    files = hub_set(tmp_path / "a", "clip-benchmark", "wds_other-tiny", 8, 2)
    files |= hub_set(tmp_path / "b", "clip-benchmark", "wds_other-pairs", 4, 0, retrieval=True)
    serve(files)
    fetch_sets(tmp_path / "sets", "--only=other-tiny", "--home=clip-benchmark")
    fetch_sets(tmp_path / "sets", "--only=pairs")  # wherever asked, it is in that home
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == [
        "wds_other-pairs", "wds_other-tiny"]


def test_a_set_of_another_size_than_its_row_is_refused_and_the_rest_still_fetched(
        tmp_path, rows, serve):
    files = hub_set(tmp_path / "a", "djghosh", "wds_tiny_test", 7, 2)
    files |= hub_set(tmp_path / "b", "clip-benchmark", "wds_other-pairs", 4, 0, retrieval=True)
    serve(files)
    with pytest.raises(ValueError, match="1 of 2 sets failed: tiny .*7 images in 2 classes, "
                                         "but tiny has 8 in 2"):
        fetch_sets(tmp_path / "sets")
    assert (tmp_path / "sets" / "wds_other-pairs" / "test" / "1.tar").exists()


def test_a_set_that_the_hub_lacks_is_named(tmp_path, rows, serve):
    serve({})
    with pytest.raises(ValueError, match="tiny .data set djghosh/wds_tiny_test on the hub: 401"):
        fetch_sets(tmp_path / "sets", "--only=tiny")


def test_the_list_says_what_is_complete_incomplete_and_absent(tmp_path, rows, capsys, serve):
    serve(hub_set(tmp_path, "djghosh", "wds_tiny_test", 8, 2))
    fetch_sets(tmp_path / "sets", "--only=tiny")
    prepare_benchmarks.main([str(tmp_path / "sets"), "--list=true"])
    complete = capsys.readouterr().out
    (tmp_path / "sets" / "wds_tiny_test" / "test" / "1.tar").unlink()
    prepare_benchmarks.main([str(tmp_path / "sets"), "--list=true"])
    assert "classes  complete" in complete and "absent" in complete
    assert "INCOMPLETE" in capsys.readouterr().out


def test_the_list_without_any_folder_shows_all_rows_of_the_paper(capsys):
    prepare_benchmarks.main(["nowhere", "--list=true"])
    out = capsys.readouterr().out
    assert out.count("absent") == 32 and "vtab-clevr_closest_object_distance" in out


def test_an_unknown_set_is_refused():
    with pytest.raises(ValueError, match="--only=cifar: no such set; --list shows the names"):
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


def test_a_cut_idx_file_is_refused(tmp_path):
    write_idx(tmp_path / "a.gz", np.zeros((3, 2, 2), np.uint8))
    content = gzip.decompress((tmp_path / "a.gz").read_bytes())
    (tmp_path / "a.gz").write_bytes(gzip.compress(content[:-1]))
    with pytest.raises(ValueError, match="size 11 into shape .3,2,2."):
        prepare_benchmarks.read_idx(tmp_path / "a.gz")


def test_a_gz_file_that_was_cut_in_fetching_is_refused(tmp_path):
    write_idx(tmp_path / "a.gz", np.zeros((3, 2, 2), np.uint8))
    content = (tmp_path / "a.gz").read_bytes()
    (tmp_path / "a.gz").write_bytes(content[:len(content) // 2])
    with pytest.raises(ValueError, match="a.gz: cut short or damaged"):
        prepare_benchmarks.read_idx(tmp_path / "a.gz")



@pytest.fixture
def animals(tmp_path):
    """Class folders: cat/1.png, cat/2.bmp, grey_heron/deep/1.jpg."""
    for i, name in enumerate(["cat/1.png", "cat/2.bmp", "grey_heron/deep/1.jpg"]):
        path = tmp_path / "animals" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (80 * i, 0, 0)).save(path)
    return tmp_path / "animals"


def make_set(animals, *options):
    """Run "folders" -> the set."""
    prepare_benchmarks.main(["folders", str(animals), str(animals.parent / "sets"), *options])
    found = benchmarks.find_sets(animals.parent / "sets")
    return benchmarks.BenchmarkSet(list(found.values())[0])


def test_class_folders_become_a_set(animals):
    (animals.parent / "t.txt").write_text("a photo of a {c}.\n\na {c}.\n")
    made = make_set(animals, "--name=pets", f"--templates={animals.parent / 't.txt'}")
    assert made.name == "pets" and made.labels.tolist() == [0, 0, 1]
    assert made.prompts()[2:] == ["a photo of a grey heron.", "a grey heron."]
    assert [made.image(i).getpixel((4, 4))[0] for i in range(2)] == [0, 80]


def test_a_template_without_a_place_for_the_class_is_refused(animals):
    (animals.parent / "t.txt").write_text("a photo of a {c}.\na photo.\n")
    with pytest.raises(ValueError, match="t.txt: each line needs {c}"):
        make_set(animals, f"--templates={animals.parent / 't.txt'}")


def test_a_table_of_labels_becomes_a_set(animals):
    table = animals.parent / "labels.csv"
    table.write_text("image;label\ncat/1.png;tom\nanimals/cat/2.bmp;tom_cat\n"
                     "grey_heron/deep/1.jpg;tom\n")
    made = make_set(animals, f"--labels={table}")
    assert made.name == "animals" and made.labels.tolist() == [0, 1, 0]
    assert made.prompts() == ["a photo of a tom.", "a photo of a tom cat."]


def test_numbered_labels_are_refused(animals):
    table = animals.parent / "labels.csv"
    table.write_text("file,label\ncat/1.png,2\ncat/2.bmp,2\ngrey_heron/deep/1.jpg,0\n")
    with pytest.raises(ValueError, match="labels are numbers .0, 2.; write the names of the classes"):
        make_set(animals, f"--labels={table}")


@pytest.mark.parametrize("text, message", [
    ("cat/1.png,a\ncat/2.bmp,a\n", "1 pictures lie in no class folder or in no row: grey_heron/deep/1.jpg"),
    ("cat/1.png,a\ncat/2.bmp,a\ngrey_heron/deep/1.jpg,\n", "grey_heron/deep/1.jpg needs one label, has ....$"),
    ("cat/1.png,a\ncat/1.png,b\ncat/2.bmp,a\ngrey_heron/deep/1.jpg,b\n", "cat/1.png needs one label, has .'a', 'b'"),
    ("cat/3.png,a\n", "cat/3.png: no such picture"),
])
def test_a_table_that_does_not_fit_the_pictures_is_refused(animals, text, message):
    (animals.parent / "labels.csv").write_text("file,label\n" + text)
    with pytest.raises(ValueError, match=message):
        make_set(animals, f"--labels={animals.parent / 'labels.csv'}")
    assert not list(animals.parent.glob("sets/wds*"))


def test_pictures_that_cannot_be_in_a_set_are_named(animals):
    (animals / "cat" / "3.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="cat/3.png: unreadable .not an image"):
        make_set(animals)
    (animals / "cat" / "3.png").rename(animals / "3.png")
    with pytest.raises(ValueError, match="1 pictures lie in no class folder or in no row: 3.png"):
        make_set(animals)


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


def test_two_processes_fetch_and_convert_what_one_converts(release, tmp_path, vocabulary, serve):
    files = {f"o/n/data/{path.name}": path.read_bytes() for path in release.iterdir()}
    server = serve(files | {"o/n/README.md": b"#"})
    address = "https://huggingface.co/datasets/o/n"
    prepare(address, tmp_path / "remote", vocabulary, "--workers=2")
    prepare(release, tmp_path / "local", vocabulary)
    assert tars(tmp_path / "remote") == tars(tmp_path / "local")
    assert not (tmp_path / "remote" / "fetched").exists() and len(server.fetched()) == 3
    server.log.clear()
    prepare("o/n", tmp_path / "remote", vocabulary)
    assert [path for _, path, _ in server.log] == ["/api/datasets/o/n"]


def test_a_file_that_the_hub_has_broken_fails_alone(release, tmp_path, vocabulary, serve):
    files = {f"o/n/{path.name}": path.read_bytes() for path in release.iterdir()}
    files["o/n/train-00001-of-00003.parquet"] = b"<html>"
    serve(files)
    with pytest.raises(ValueError, match="1 of 3 files failed, the first: train-00001"):
        prepare("o/n", tmp_path / "out", vocabulary)
    assert len(tars(tmp_path / "out")) == 2
    assert not list((tmp_path / "out").rglob("*.parquet"))  # so that it is fetched anew


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
    counts = {reason: len(numbers) for reason, numbers in done["skipped"].items()}
    assert counts == {reason: len(rows) for reason, rows in bad.items()} | {
        "empty": 1, "not an image": 1, "truncated": 1}
    assert done["skipped"]["token id out of range"] == [205, 206]
    assert report["rows"] == report["pairs"] + sum(counts.values())
    assert report["skipped: empty caption"] == 2
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
    with pytest.raises(ValueError, match="columns are image, caption, must be images and texts"):
        prepare(tmp_path / "in", tmp_path / "out", vocabulary)


def test_a_folder_without_parquet_files_is_named(tmp_path, vocabulary):
    with pytest.raises(ValueError, match="nowhere: no folder and no data set; write OWNER/NAME"):
        prepare(tmp_path / "nowhere", tmp_path / "out", vocabulary)


def test_parquet_files_of_one_name_are_refused(release, tmp_path, vocabulary):
    (release / "more").mkdir()
    (release / "more" / "train-00000-of-00003.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="each of another name, .*has 4 files of 3 names"):
        prepare(release, tmp_path / "out", vocabulary)


def test_without_pyarrow_one_line_says_what_to_install(release, tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        prepare(release, tmp_path / "out", vocabulary)


# ---------------------------------------------------------------------------------------- progress

def test_progress_gives_the_rate_since_the_first_unit_and_the_time_left(monkeypatch, capsys):
    clock = iter([0.0, 100.0, 100.0, 120.0, 120.0])  # made; the first unit after 100 s; +20 s
    monkeypatch.setattr("data.log.time.monotonic", lambda: next(clock))
    line = Progress("files", 16, "files", done=5)
    monkeypatch.setattr("data.log.PROGRESS_EVERY", 1e9)
    line.add()
    monkeypatch.setattr("data.log.PROGRESS_EVERY", 0)
    line.add(2)
    assert capsys.readouterr().out == ("files: 8 of 16 files (50%), 0.1 files/s, eta 1.3 min\n")
