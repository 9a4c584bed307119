"""Pairs on disk: webdataset tar shards, read in place through an index that is built once.

    FOLDER/00000.tar ...     key.jpg|jpeg|png|webp|gif|bmp|tif and key.txt (UTF-8, a caption a
                             line) or, where there is no .txt, key.json ("caption" or "text")
    FOLDER/held_out/*.tar    pairs kept for evaluation: a folder of its own, with its own index
    FOLDER/index/VOCABULARY/ samples.npy, keys.npy, ids.npy, starts.npy, index.json

Where FOLDER itself has no shards, those of its subfolders are taken, but for SET_ASIDE.
An index takes about 110 bytes a pair. data/prepare/index.py builds it anew when a shard's name,
size, or first or last 64 kB change.
"""
import glob
import hashlib
import json
import os
import resource
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.log import cache_folder

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
SET_ASIDE = {"held_out", "val", "valid", "validation", "test", "index"}  # never trained on
FORMAT = "perceptual-clip index 2"
# One row a pair. Offsets are in bytes: of members in their shard, of keys in keys.npy's data.
# json is 1 if the caption is in a .json. Fingerprints are made of these bytes.
SAMPLE = np.dtype([("shard", "u4"), ("captions", "u4"), ("image_at", "u8"),
                   ("image_size", "u8"), ("text_at", "u8"), ("text_size", "u8"),
                   ("first_caption", "u8"), ("key_at", "u8"), ("key_size", "u2"),
                   ("json", "u2")])


def caption_lines(raw, is_json=False):
    """Bytes of a .txt member -> its lines that are not blank; of a .json, the caption in it.

    Bytes that are not UTF-8 become U+FFFD; NUL, the end of a word in data/text.py, a space.
    """
    if is_json:
        raw = _json_caption(raw)
    lines = raw.decode(errors="replace").replace("\0", " ").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _json_caption(raw):
    try:
        fields = json.loads(raw)
        words = (fields.get("caption") or fields.get("text")).split()
    except (ValueError, AttributeError):  # not JSON, or no text under these names
        return b""
    return " ".join(words).encode(errors="replace")


def index_shards(folder, tokenizer=None):
    """Build FOLDER's index unless a fitting one is there; return the number of pairs.

    With a tokenizer it holds token ids. Of several processes one builds, the others wait.
    Raises FileNotFoundError without shards, ValueError without a usable pair.
    """
    found = find_index(folder, tokenizer)
    if found is None:
        from data.prepare.index import build_index  # here, as all later starts only read
        found = build_index(folder, tokenizer)
    return found[1]["samples"]


def find_shards(folder):
    """{name: [size, digest of both ends]} of FOLDER's shards; FileNotFoundError without any."""
    names = glob.glob("*.tar", root_dir=folder)
    if not names:
        for name in glob.glob("**/*.tar", root_dir=folder, recursive=True):  # no hidden ones
            if SET_ASIDE.isdisjoint(name.split("/")) and ".unfinished/" not in name:
                names.append(name)
    if not names:
        raise FileNotFoundError(f"{folder} holds no .tar shards; see data/prepare/own.py")
    shards = {}
    for name in sorted(names):
        with open(Path(folder, name), "rb") as file:
            size = os.path.getsize(file.fileno())
            ends = os.pread(file.fileno(), 2**16, 0)
            ends += os.pread(file.fileno(), 2**16, max(0, size - 2**16))
        shards[name] = [size, hashlib.sha256(ends).hexdigest()[:16]]
    return shards


def find_index(folder, tokenizer=None):
    """(its folder, content of its index.json) of the index that fits FOLDER's shards, or None.

    Without a tokenizer the index of any vocabulary will do.
    """
    name, shards = tokenizer.fingerprint if tokenizer else "*", find_shards(folder)
    for place in (Path(folder, "index"), cache_folder(folder)):
        for found in sorted(glob.glob(f"{name}/index.json", root_dir=place)):  # no hidden ones
            index = json.loads((place / found).read_text())
            if index["format"] == FORMAT and index["shards"] == shards:
                return (place / found).parent, index
    return None


class Shards:
    """The pairs of an indexed folder by number: `Shards(folder)[i]` -> (image bytes, captions).

    With a tokenizer, `ids` gives its token ids. Cheap to send to a worker process, which maps
    the index again. Raises FileNotFoundError without an index of the shards as they are.
    """

    def __init__(self, folder, tokenizer=None):
        found = find_index(folder, tokenizer)
        if found is None:
            raise FileNotFoundError(f"{folder} has no index of its shards as they are now")
        place, index = found
        self.__setstate__((Path(folder), place, list(index["shards"]), index["fingerprint"]))

    def __getstate__(self):  # pickling a memory map would copy the whole array
        return self.folder, self._place, self._shards, self.fingerprint

    def __setstate__(self, state):
        self.folder, self._place, self._shards, self.fingerprint = state
        arrays = []
        for name in ("samples", "keys", "ids", "starts"):
            mapped = np.load(self._place / f"{name}.npy", mmap_mode="r")
            arrays.append(np.asarray(mapped))  # np.memmap's own indexing takes 2 us more
        self._samples, self._keys, self._ids, self._starts = arrays
        # A file closes when it is dropped; pread lets threads and forked workers share it.
        self._file = lru_cache(allow_open_files(len(self._shards)))(self._open)

    def _open(self, shard):
        return open(self.folder / self._shards[shard], "rb", buffering=0)

    def __len__(self):
        return len(self._samples)

    def __getitem__(self, i):
        return self.image(i), self.captions(i)

    def image(self, i):
        """The image file of sample i, as bytes."""
        row = self._samples[i]
        return self._read(row["shard"], row["image_at"], row["image_size"])

    def captions(self, i):
        """The captions of sample i, as a list of str."""
        row = self._samples[i]
        raw = self._read(row["shard"], row["text_at"], row["text_size"])
        return caption_lines(raw, is_json=row["json"] == 1)

    def caption_count(self, i):
        """How many captions sample i has; at least 1."""
        return int(self._samples[i]["captions"])

    def ids(self, i, caption):
        """Token ids of one caption of sample i, without start and end: (n,) uint16."""
        which = int(self._samples[i]["first_caption"]) + caption
        return self._ids[self._starts[which]:self._starts[which + 1]]

    def name(self, i):
        """Where sample i lies, for people: "00000.tar:key"."""
        row = self._samples[i]
        key = self._keys[row["key_at"]:row["key_at"] + row["key_size"]]
        return f"{self._shards[row['shard']]}:{key.tobytes().decode(errors='replace')}"

    def _read(self, shard, at, size):
        file = self._file(shard)
        raw = os.pread(file.fileno(), size, at)
        if len(raw) != size:  # else a caption would be cut without a word
            raise ValueError(f"{file.name} became shorter while it was in use")
        return raw


def allow_open_files(count):
    """How many of `count` files to keep open: at most half of the limit, raised if need be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= 2 * count:
        return count
    soft = 2 * count if hard == resource.RLIM_INFINITY else min(2 * count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft // 2
