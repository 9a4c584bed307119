"""Downloads and the preparation of published data: loopback servers, parquet files, zips."""
import hashlib
import http.server
import json
import threading
import time

import numpy as np
import pytest

from data.download import CHUNK, download, hub_files


class Server(http.server.ThreadingHTTPServer):
    """An HTTP server on the loopback device whose manners a test sets.

    files: {path: bytes}; cut: bytes after which each reply ends, though it promised more;
    ranges: whether it honours Range; log: (path, Range header) of each request;
    fail: {path: [status codes of the first replies]}; page: entries per page of a listing;
    pauses: seconds that the first replies keep silent for.
    """

    def __init__(self, files, cut=None, ranges=True, fail=None, page=1000, pauses=()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.cut, self.ranges, self.fail = files, cut, ranges, fail or {}
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
    monkeypatch.setattr("data.download.TIMEOUT", 0.1)
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
