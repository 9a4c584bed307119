"""Pairs on disk: webdataset tar shards, read in place through an index that is built once.

    FOLDER/00000.tar ...     key.jpg|jpeg|png|webp|gif|bmp|tif + key.txt (UTF-8, one caption a line)
    FOLDER/held_out/*.tar    pairs kept for evaluation: a folder of its own, with its own index
    FOLDER/index/VOCABULARY/ samples.npy, keys.npy, ids.npy, starts.npy, index.json (counts, faults)

    python -m data.shards index FOLDER --vocabulary=FILE  # optional: pretrain.py does it by itself
    python -m data.shards check FOLDER                    # reads everything; exit 1 if any is bad

A key is a member's path up to the first dot of its last part, as webdataset has it. The parts of a
sample need not be neighbours; members of other kinds (.json, ...) are passed over. Reading is
random access by (shard, offset, size): nothing is unpacked, nothing is copied.

An index takes 60 bytes a pair, its key, and 8 bytes plus 2 a token for each caption: about 110
bytes a pair, 1.7 GB for 15 million, all memory-mapped. Building it takes 0.7 minutes of one core
a million pairs, plus the disk's time for headers and captions; a process holds one shard's worth,
and an interrupted build goes on after the shards it has finished. A shard whose size or time has
changed makes the index stale: copy data with their times (cp -a, rsync -a), or pay again.
"""
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from data.log import Progress

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
FORMAT = "perceptual-clip index 1"
# One row a pair. Offsets are in bytes: of members in their shard, of keys in keys.npy's data.
SAMPLE = np.dtype([("shard", "u4"), ("captions", "u4"), ("image_at", "u8"), ("image_size", "u8"),
                   ("text_at", "u8"), ("text_size", "u8"), ("first_caption", "u8"),
                   ("key_at", "u8"), ("key_size", "u4")])
OPEN_SHARDS = 256  # descriptors a process keeps: a quarter of the usual limit of 1,024
BYTES_A_PROCESS = 2**26  # below 64 MB one more process costs more to start than it saves
EXAMPLES = 5  # names kept for each reason
# What an index counts and names. These samples are kept, all others are left out:
MENDED = ("duplicate key", "NUL in caption", "caption not UTF-8")


# ---------------------------------------------------------------- writing


@contextmanager
def replacing(path):
    """A binary file that becomes `path` when the block ends well, and nothing when it does not."""
    unfinished = f"{path}.{os.getpid()}.tmp"
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


# ---------------------------------------------------------------- reading one shard

class BrokenTar(ValueError):
    """The tar ends early or holds a damaged header; `name`: the member it happened in, or b""."""

    def __init__(self, name):
        super().__init__(name)
        self.name = name


def tar_members(descriptor):
    """Yield (name as bytes, offset, size) of each regular file of an open tar.

    Reads headers only. Names of all three dialects: ustar, GNU long names (an L member before the
    file's own header), pax (an x member). Raises BrokenTar after the last whole member.
    """
    at, length, extended = 0, os.fstat(descriptor).st_size, {}
    while at < length:
        header = os.pread(descriptor, 512, at)
        if not header.strip(b"\0"):  # a block of zeros ends the archive
            return
        try:
            name, size, kind = _parse_header(header)
        except ValueError:
            raise BrokenTar(extended.get(b"path", b"")) from None
        name, size = extended.get(b"path", name), int(extended.get(b"size", size))
        at += 512
        if at + size > length:
            raise BrokenTar(name)
        if kind == b"L":
            extended = {b"path": os.pread(descriptor, size, at).rstrip(b"\0")}
        elif kind == b"x":
            extended = _parse_pax(os.pread(descriptor, size, at))
        else:
            extended = {}
            if kind in b"0\0":  # also old tars' NUL; not folders, links and devices
                yield name, at, size
        at += -(-size // 512) * 512


def _parse_header(header):
    """(name, size, kind) of a 512-byte tar header; ValueError if it is none."""
    def number(field):  # octal text, or from 8 GB on (GNU) a flag bit and a big-endian number
        if field[0] & 0x80:
            return int.from_bytes(field[1:], "big")
        return int(field.strip(b" \0") or b"0", 8)

    stated, found = number(header[148:156]), sum(header[:148] + header[156:]) + 8 * ord(" ")
    if len(header) < 512 or stated != found:  # the checksum counts its own field as spaces
        raise ValueError("checksum")
    name = header[:100].rstrip(b"\0")
    if header[257:263] == b"ustar\0" and header[345]:  # GNU keeps other things there
        name = header[345:500].rstrip(b"\0") + b"/" + name
    return name, number(header[124:136]), header[156:157]


def _parse_pax(content):
    """Records "length key=value\\n" of a pax header -> {key: value}, as bytes."""
    fields = {}
    while content:
        length = int(content.partition(b" ")[0])
        key, _, value = content[:length - 1].partition(b" ")[2].partition(b"=")
        fields[key] = value
        content = content[length:]
    return fields


def caption_lines(raw):
    """Bytes of a .txt member -> its captions: UTF-8 lines, stripped, without the blank ones.

    Bytes that are not UTF-8 become U+FFFD; NUL, which marks the ends of words for the tokenizer
    (data/text.py), becomes a space. Text that merely looks wrong stays as it is.
    """
    text = raw.decode(errors="replace").replace("\0", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_shard(path):
    """One shard's samples, and what is wrong with it.

    Returns [(key, (image offset, size), (text offset, size), captions), ...] in the tar's order of
    images, and {reason: [names]}: those of MENDED name samples that were kept.
    """
    with open(path, "rb") as file:
        images, texts, problems = _find_members(file.fileno())
        samples = []
        for key, image in images.items():
            if key not in texts:
                problems["image without caption"].append(key)
                continue
            at, size = text = texts.pop(key)
            raw = os.pread(file.fileno(), size, at)
            captions = caption_lines(raw)
            if not captions:
                problems["empty caption"].append(key)
                continue
            samples.append((key, image, text, captions))
            if b"\0" in raw:
                problems["NUL in caption"].append(key)
            if any("\ufffd" in caption for caption in captions):
                problems["caption not UTF-8"].append(key)
    problems["caption without image"] += texts
    return samples, {reason: [_name(path, key) for key in keys]
                     for reason, keys in problems.items() if keys}


def _name(shard, key):
    return f"{Path(shard).name}:{key.decode(errors='replace')}"


def _find_members(descriptor):
    """Places {key: (offset, size)} of images and of captions, and {reason: [keys]}."""
    images, texts, twice, cut = {}, {}, {}, []
    try:
        for name, at, size in tar_members(descriptor):
            key, kind = _split_name(name)
            table = images if kind in IMAGE_KINDS else texts if kind == "txt" else None
            if table is None or not key:
                continue
            if key in table:
                twice[key] = True
            else:
                table[key] = (at, size)
    except BrokenTar as broken:  # what came before stays; the sample it happened in is lost
        key, _ = _split_name(broken.name)
        cut.append(key)
        images.pop(key, None), texts.pop(key, None)
    return images, texts, defaultdict(list, {"tar cut off": cut, "duplicate key": list(twice)})


def _split_name(name):
    """b"a/b.c.JPG" -> (b"a/b", "c.jpg"); no key for hidden files such as macOS's "._x.jpg"."""
    folder, slash, file = name.rpartition(b"/")
    stem, _, kind = file.partition(b".")
    return folder + slash + stem if stem else b"", kind.lower().decode(errors="replace")


# ---------------------------------------------------------------- the index

def index_shards(folder, tokenizer=None):
    """Build FOLDER's index unless a fitting one is there; return the number of pairs.

    With a tokenizer it holds the captions' token ids too; each vocabulary has its own index. It is
    built anew when shards have come, gone or changed size or time. Its fingerprint, which
    checkpoints remember, covers names, sizes, keys and captions: it survives a copy. Several
    processes may call at once: one builds, the others wait. Raises FileNotFoundError without
    shards, ValueError without a usable pair.
    """
    folder, name = Path(folder), tokenizer.fingerprint if tokenizer else "none"
    _find_shards(folder)  # without any, nothing is left behind either
    if tokenizer and tokenizer.size > 2**16:
        raise ValueError(f"vocabulary {name} has {tokenizer.size:,} ids; indexes hold up to 65,536")
    if not _fits(folder, name):
        (folder / "index").mkdir(exist_ok=True)
        with open(folder / "index" / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also by a crash
            if not _fits(folder, name):
                _build(folder, folder / "index" / name, tokenizer)
    return read_index(folder, name)["samples"]


def read_index(folder, name):
    """The content of FOLDER/index/NAME/index.json, if it fits the shards that are there.

    Raises FileNotFoundError without shards or index, ValueError for an index of other shards.
    """
    shards, path = _find_shards(folder), Path(folder, "index", name, "index.json")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run python -m data.shards index {folder}")
    index = json.loads(path.read_text())
    if index["format"] != FORMAT:
        raise ValueError(f"{path} has format {index['format']!r}, not {FORMAT!r}; delete it")
    changed = [shard for shard in sorted(shards.keys() | index["shards"])
               if shards.get(shard) != index["shards"].get(shard)]
    if changed:
        raise ValueError(f"{folder}: {changed[0]} and {len(changed) - 1} more shards came, went or "
                         f"changed since {path} was made; run python -m data.shards index {folder}")
    return index


def _fits(folder, name):
    try:
        return bool(read_index(folder, name))
    except (FileNotFoundError, ValueError):  # none, or of other shards
        return False


def _find_shards(folder):
    """{name: [size in bytes, time of last change in ns]}, by name."""
    found = ((path.name, path.stat()) for path in sorted(Path(folder).glob("*.tar")))
    shards = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found}
    if not shards:
        raise FileNotFoundError(f"{folder} holds no .tar shards; see python -m data.prepare.own --help")
    return shards


def _build(folder, target, tokenizer):
    """Index the shards one by one, join the parts, and put the whole in place at once."""
    shards, unfinished = _find_shards(folder), target.with_name(f"{target.name}.unfinished")
    unfinished.mkdir(exist_ok=True)
    # a part's name says what it was made from: those of an interrupted build serve again
    parts = [unfinished / f"{name}.{size}.{time}.npz" for name, (size, time) in shards.items()]
    todo = [(folder / name, part) for name, part in zip(shards, parts) if not part.exists()]
    progress = Progress("indexing", len(parts), "shards", done=len(parts) - len(todo))
    todo_size = sum(path.stat().st_size for path, _ in todo)
    for _ in _in_parallel(partial(_index_shard, tokenizer=tokenizer), todo, todo_size):
        progress.add()
    index, lengths = _sum_up(folder, shards, parts)
    _join(unfinished, parts, lengths)
    (unfinished / "index.json").write_text(json.dumps(index, indent=1))
    for part in unfinished.glob("*.npz"):
        part.unlink()
    shutil.rmtree(target, ignore_errors=True)  # who has it mapped keeps reading the old one
    unfinished.rename(target)
    print(f"indexed {folder}: {index['samples']:,} pairs with {lengths['captions']:,} captions, "
          f"fingerprint {index['fingerprint']}", *report(index["problems"]), sep="\n", flush=True)


def _in_parallel(work, jobs, total_bytes):
    """Yield work(job) of each job, in order, from as many processes as pay for themselves."""
    processes = min(os.cpu_count(), len(jobs), 1 + total_bytes // BYTES_A_PROCESS)
    if processes <= 1:
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(processes) as pool:
        # a few jobs at a time: each such chunk carries its own copy of the tokenizer
        yield from pool.map(work, jobs, chunksize=min(8, -(-len(jobs) // processes)))


def _index_shard(job, tokenizer):
    """Index one shard into a part file; offsets of keys, captions and ids start at 0 in it."""
    path, part = job
    samples, problems = read_shard(path)
    rows = np.array([(0, len(lines), *image, *text, 0, 0, len(key))
                     for key, image, text, lines in samples], SAMPLE)
    for at, size in (("first_caption", "captions"), ("key_at", "key_size")):
        rows[at] = np.cumsum(rows[size]) - rows[size]
    keys = b"".join(sample[0] for sample in samples)
    captions = [line for sample in samples for line in sample[3]]
    ids = tokenizer.encode(captions) if tokenizer and captions else [[] for _ in captions]
    digest = hashlib.sha256(rows.tobytes() + keys + "\n".join(captions).encode())
    with replacing(part) as file:
        np.savez(file, samples=rows, keys=np.frombuffer(keys, np.uint8),
                 ids=np.fromiter(itertools.chain.from_iterable(ids), np.uint16),
                 starts=np.cumsum([0, *map(len, ids)], dtype=np.uint64)[:-1],
                 digest=digest.hexdigest(), problems=json.dumps(problems))


def _sum_up(folder, shards, parts):
    """The content of index.json, and {"samples", "keys", "captions", "ids": how many there are}."""
    problems, lengths = {}, Counter()
    digest = hashlib.sha256(repr([(name, size) for name, (size, _) in shards.items()]).encode())
    for path in parts:
        with np.load(path) as part:
            lengths.update(samples=len(part["samples"]), keys=len(part["keys"]),
                           captions=len(part["starts"]), ids=len(part["ids"]))
            digest.update(part["digest"].item().encode())
            _add_problems(problems, json.loads(part["problems"].item()))
    if not lengths["samples"]:
        raise ValueError(f"{folder} holds no usable pair:{''.join(report(problems)[:5])}")
    return {"format": FORMAT, "fingerprint": digest.hexdigest()[:16], "shards": shards,
            "samples": lengths["samples"], "problems": problems}, lengths


def _add_problems(total, some):
    """Add one shard's {reason: [names]} to {reason: {"count", "examples"}}."""
    for reason, names in some.items():
        entry = total.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += len(names)
        entry["examples"] = (entry["examples"] + names)[:EXAMPLES]


def _join(folder, parts, lengths):
    """Append the parts to the index's arrays on disk, one part in memory at a time."""
    samples, keys, ids, starts = (
        open_memmap(folder / f"{name}.npy", "w+", kind, (length,)) for name, kind, length in (
            ("samples", SAMPLE, lengths["samples"]), ("keys", np.uint8, lengths["keys"]),
            ("ids", np.uint16, lengths["ids"]), ("starts", np.uint64, lengths["captions"] + 1)))
    sample = key = token = caption = 0  # how far each array is filled
    for number, path in enumerate(parts):
        with np.load(path) as part:
            rows = part["samples"]
            rows["shard"] = number
            rows["key_at"] += np.uint64(key)
            rows["first_caption"] += np.uint64(caption)
            for array, at, some in ((samples, sample, rows), (keys, key, part["keys"]),
                                    (ids, token, part["ids"]),
                                    (starts, caption, part["starts"] + np.uint64(token))):
                array[at:at + len(some)] = some
            sample, key = sample + len(rows), key + len(part["keys"])
            token, caption = token + len(part["ids"]), caption + len(part["starts"])
    starts[caption] = token
    for array in (samples, keys, ids, starts):
        array.flush()


def report(problems):
    """A line for each reason: how often, what became of the samples, and the first names."""
    return [f"  {entry['count']:,} x {reason} ({'kept' if reason in MENDED else 'left out'}): "
            f"{', '.join(entry['examples'])}{', ...' if entry['count'] > EXAMPLES else ''}"
            for reason, entry in sorted(problems.items(), key=lambda item: -item[1]["count"])]


# ---------------------------------------------------------------- random access

class Shards:
    """The pairs of an indexed folder by number: `Shards(folder)[i]` -> (image bytes, captions).

    With a tokenizer, `ids` gives stored token ids; without, the index of any vocabulary will do.
    Cheap to send to a worker process: arrays are mapped again there, shards opened when first read.
    Raises what `read_index` does.
    """

    def __init__(self, folder, tokenizer=None):
        self.folder, self._arguments = Path(folder), (folder, tokenizer)
        made = sorted(path.parent.name for path in self.folder.glob("index/*/index.json"))
        self._name = tokenizer.fingerprint if tokenizer else next(
            (name for name in made if _fits(folder, name)), "none")
        index = read_index(folder, self._name)
        self.fingerprint = index["fingerprint"]
        self._shards = list(index["shards"])
        self._samples, self._keys, self._ids, self._starts = map(
            self._map, ("samples", "keys", "ids", "starts"))
        # Files need no closing here: the one that is dropped closes when its last reader is done.
        # pread moves no position, so threads and forked workers may share them.
        self._file = lru_cache(OPEN_SHARDS)(lambda shard: open(
            self.folder / self._shards[shard], "rb", buffering=0))

    def _map(self, name):  # as a plain array: np.memmap's own indexing takes 2 us more
        path = self.folder / "index" / self._name / f"{name}.npy"
        return np.asarray(np.load(path, mmap_mode="r"))

    def __reduce__(self):  # pickling a memory map would copy the whole array
        return type(self), self._arguments

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
        return caption_lines(self._read(row["shard"], row["text_at"], row["text_size"]))

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
        return _name(self._shards[row["shard"]], key.tobytes())

    def _read(self, shard, at, size):
        file = self._file(int(shard))
        raw = os.pread(file.fileno(), int(size), int(at))
        if len(raw) != size:
            raise ValueError(f"{file.name} became shorter while it was in use; put it back, "
                             f"or run python -m data.shards index {self.folder}")
        return raw


# ---------------------------------------------------------------- commands
