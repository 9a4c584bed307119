"""Fetches files over HTTP so that a cut connection, a kill or a wrong file does no harm.

    download(url, path, size=..., sha256=...)    one file: `path` is whole and checked, or absent
    hub_files(address)                           what a data set on the Hugging Face hub holds

While a file grows it is called `path.part`; the same call goes on from there (a Range request).
"""
import hashlib
import http.client
import json
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from data.log import Progress

CHUNK = 1 << 20  # bytes read at a time; an attempt that brings this much counts as progress
TIMEOUT = 60.0   # seconds without a byte until a connection counts as dead
ATTEMPTS = 6     # failures in a row without progress; waits of 1, 2, 4, 8, 16 s between them
# What may go away by itself. A full disk (another OSError) does not, and passes through.
PASSING = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError,
           ssl.SSLError)


class HubFile(NamedTuple):
    """A file of a data set on the hub."""
    path: str           # within the data set
    size: int           # bytes
    sha256: str | None  # of the content; the hub states it for large files only
    url: str


def download(url, path, size=None, sha256=None, wait=1.0, progress=True):
    """Fetch `url` into `path` unless it is there; returns the Path.

    size (bytes) and sha256 (hex) are what the file must have, where known. A file that is there
    already is taken as good when its size fits: it got its name after these checks.
    wait: seconds before the second attempt, doubled for each further one.
    Raises FileNotFoundError when the server has no such file, ValueError when it refuses, keeps
    failing (`path.part` stays, to go on from) or sends something else (`path.part` is removed:
    going on from wrong bytes would end wrong again).
    """
    path = Path(path)
    if path.exists():
        if size is not None and path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected {size:,}; remove "
                             "it and start again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    _fetch(url, part, size, wait, progress)
    if sha256 and (found := sha256_of(part)) != sha256:
        part.unlink()
        raise ValueError(f"{url}: sha256 is {found}, expected {sha256}; nothing was kept, try "
                         "again or fetch it by other means")
    os.replace(part, path)
    return path


def hub_files(address):
    """List the files of a data set, [HubFile], from an address like .../datasets/OWNER/NAME."""
    base, _, name = address.rstrip("/").partition("/datasets/")
    if not base.startswith(("http://", "https://")) or name.count("/") != 1:
        raise ValueError(f"{address}: write https://huggingface.co/datasets/OWNER/NAME")
    page, found = f"{base}/api/datasets/{name}/tree/main?recursive=true", []
    while page:  # the hub answers in pages of 1,000 entries, each naming the next in "Link"
        try:
            with _open(page) as reply:
                entries, page = json.load(reply), _next_page(reply.headers.get("Link", ""))
        except (*PASSING, json.JSONDecodeError) as error:
            raise ValueError(f"{page}: no usable answer ({error}); try again later") from None
        for entry in entries:
            if entry["type"] == "file":
                url = f"{base}/datasets/{name}/resolve/main/{urllib.request.quote(entry['path'])}"
                large = entry.get("lfs", {})
                found.append(HubFile(entry["path"], entry["size"], large.get("oid"), url))
    return found


def sha256_of(path):
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_room(folder, needed):
    """ValueError unless the disk of `folder` has `needed` free bytes: better now than when full."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free")


def _fetch(url, part, size, wait, progress):
    """Grow `part` until it is whole; failures wait and go on, within ATTEMPTS."""
    failures = 0
    while True:
        before = _length(part)
        try:
            total = _append(url, part, size, progress)
            if _length(part) == total:
                return
            problem = "the connection ended early"
        except PASSING as error:
            problem = str(error) or type(error).__name__
        failures = 0 if _length(part) - before >= CHUNK else failures + 1
        if failures == ATTEMPTS:
            raise ValueError(f"{url}: gave up after {ATTEMPTS} attempts ({problem}); the same "
                             f"command goes on from byte {_length(part):,}")
        time.sleep(wait * 2 ** max(failures - 1, 0))


def _append(url, part, size, progress):
    """One request for what `part` still lacks; returns the whole file's length in bytes."""
    begin = _length(part)
    try:
        reply = _open(url, begin)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # "range not satisfiable": part is whole already, or too long
            raise
        total = _total(error.headers)
        if begin != total or size not in (None, total):
            part.unlink()
        return total
    with reply:
        if reply.headers.get("Content-Range", "").split("-")[0] != f"bytes {begin}":
            begin = 0  # the server sends the whole file, whatever was asked for
        total = _total(reply.headers)
        if total is None or size is not None and total != size:
            part.unlink(missing_ok=True)
            offered = "does not say its length" if total is None else f"is {total} bytes long there"
            raise ValueError(f"{url}: {offered}, expected {size or 'a stated length'}")
        check_room(part.parent, total - begin)
        line = Progress(part.stem, total / 1e6, "MB", done=begin / 1e6) if progress else None
        with open(part, "ab" if begin else "wb") as file:
            while chunk := reply.read(CHUNK):
                file.write(chunk)
                if line:
                    line.add(len(chunk) / 1e6)
    return total


def _open(url, begin=0):
    """The server's reply to a GET from byte `begin` on; final refusals become one-line errors."""
    headers = {"User-Agent": "perceptual-clip"} | ({"Range": f"bytes={begin}-"} if begin else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(f"{url}: the server has no such file") from None
        if error.code in (408, 416, 429) or error.code >= 500:
            raise  # busy, or about the range: the caller's matter
        raise ValueError(f"{url}: the server refuses ({error.code} {error.reason}); if it wants an "
                         "account, fetch the file with a browser and put it in place") from None


def _total(headers):
    """The whole file's bytes by Content-Range ("bytes 5-9/10", "bytes */10") or Content-Length."""
    text = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
    return int(text) if text.isdigit() else None


def _next_page(link):
    """The address marked rel="next" in a Link header, or None."""
    for entry in link.split(","):
        address, _, relation = entry.partition(";")
        if 'rel="next"' in relation:
            return address.strip(" <>")
    return None


def _length(path):
    return path.stat().st_size if path.exists() else 0
