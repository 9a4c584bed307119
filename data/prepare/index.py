"""Builds the index of a folder of shards (data/shards.py): what tars hold, and their faults.

A key is a member's path up to the first dot of its last part, as webdataset has it. The parts
of a sample need not be neighbours. What is left out, or odd but kept, is counted and named.

A million pairs take one to two core-minutes. A process holds one shard's worth; an interrupted
build goes on after the shards that it has finished.
"""
import fcntl
import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from data.log import Progress
from data.prepare.tars import in_order
from data.shards import (FORMAT, IMAGE_KINDS, SAMPLE, caption_lines, find_index, find_shards,
                         index_places, where)

ARRAYS = {"samples": SAMPLE, "keys": np.uint8, "ids": np.uint16, "starts": np.uint64}
BYTES_A_PROCESS = 2**28  # below 256 MB one more process costs more to start than it saves
EXAMPLES = 5  # names kept for each reason
# These samples are kept; those of all other reasons are left out:
FROM_JSON = "caption from .json"
KEPT = ("duplicate key", "NUL in caption", "caption not UTF-8", FROM_JSON)


# ---------------------------------------------------------------- reading one shard

def read_members(path):
    """The whole regular files of a tar, and where it breaks off.

    Returns [(name as bytes, offset, size), ...] in the tar's order, and None for a whole tar;
    else the name of the last member whose header could be read, b"" if there is none.
    """
    members, last, whole = [], b"", False
    length = os.path.getsize(path)
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
                for member in tar:
                    last = member.name.encode(errors="surrogateescape")
                    end = member.offset_data + member.size
                    if not member.offset_data <= end <= length:
                        break
                    if member.isreg():
                        members.append((last, member.offset_data, member.size))
                # At a damaged header tarfile stops without a word. A whole tar ends in zeros.
                rest = os.pread(file.fileno(), 2**20, tar.offset)
                whole = len(rest) >= 512 and not rest.strip(b"\0")
        except tarfile.TarError:
            whole = False
    return members, None if whole else last


def split_name(name):
    """b"a/b.c.JPG" -> (b"a/b", "c.jpg"); no key for hidden files such as macOS's "._x.jpg"."""
    folder, slash, file = name.rpartition(b"/")
    stem, _, kind = file.partition(b".")
    return folder + slash + stem if stem else b"", kind.lower().decode(errors="replace")


def read_shard(folder, shard):
    """The samples of FOLDER/SHARD, and what is wrong with it.

    Returns [(key, image offset, size, text offset, size, is text .json, captions), ...] in the
    tar's order of images, and [(reason, name), ...]; those of KEPT were kept.
    """
    path, samples = Path(folder, shard), []
    images, texts, problems = _find_parts(path)
    with open(path, "rb") as file:
        for key, (image_at, image_size, _) in images.items():
            if key not in texts:
                problems.append(("image without caption", key))
                continue
            at, size, is_json = texts.pop(key)
            raw = os.pread(file.fileno(), size, at)
            captions = caption_lines(raw, is_json)
            if not captions:
                problems.append(("empty caption", key))
                continue
            samples.append((key, image_at, image_size, at, size, is_json, captions))
            if is_json:
                problems.append((FROM_JSON, key))
            if b"\0" in raw:
                problems.append(("NUL in caption", key))
            if any("\ufffd" in caption for caption in captions):
                problems.append(("caption not UTF-8", key))
    problems += [("caption without image", key) for key in texts]
    return samples, [(reason, where(shard, key)) for reason, key in problems]


def _find_parts(path):
    """Images and texts as {key: (offset, size, is .json)}, and [(reason, key), ...]."""
    images, texts, jsons, problems, twice = {}, {}, {}, [], set()
    tables = dict.fromkeys(IMAGE_KINDS, images) | {"txt": texts, "json": jsons}
    members, last = read_members(path)
    for name, at, size in members:
        key, kind = split_name(name)
        if key and kind not in tables:
            problems.append(("unknown kind after the first dot", name))
        elif key and key in tables[kind]:
            twice.add(key)
        elif key:
            tables[kind][key] = (at, size, kind == "json")
    for key in images:
        if key in jsons:
            texts.setdefault(key, jsons[key])
    problems += [("duplicate key", key) for key in sorted(twice)]
    if last is not None:  # what came before stays; the sample that it happened in is lost
        key, _ = split_name(last)
        if key in images and key in texts:
            problems.append(("tar cut off", b"all after " + key))
        else:
            problems.append(("tar cut off", key or b"all"))
            images.pop(key, None)
            texts.pop(key, None)
    return images, texts, problems


def add_problems(total, some):
    """Add [(reason, name), ...] to {reason: {"count", "examples"}}."""
    for reason, name in some:
        entry = total.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if entry["count"] <= EXAMPLES:
            entry["examples"].append(name)


def report(problems):
    """A line for each reason: how often, what became of the samples, and the first names."""
    lines = []
    for reason, entry in sorted(problems.items(), key=lambda item: -item[1]["count"]):
        fate = "kept" if reason in KEPT else "left out"
        more = ", ..." if entry["count"] > EXAMPLES else ""
        names = ", ".join(entry["examples"])
        lines.append(f"  {entry['count']:,} x {reason} ({fate}): {names}{more}")
    return lines


# ---------------------------------------------------------------- the index

def build_index(folder, tokenizer):
    """Build the index that fits FOLDER's shards, once for all processes that ask for it.

    Returns (its folder, its index.json). Raises ValueError without a usable pair.
    """
    name = tokenizer.fingerprint if tokenizer else "none"
    if tokenizer and tokenizer.size > 2**16:
        raise ValueError(f"vocabulary {name} has {tokenizer.size:,} ids; an index holds 65,536")
    with _draft_folder(folder, name) as draft:
        found = find_index(folder, name)
        if found is None:  # else another process has built it meanwhile
            found = _build(folder, name, draft, tokenizer)
    return found


@contextmanager
def _draft_folder(folder, name):
    """Path of a hidden folder to build the index NAME in, while a lock keeps others out."""
    place, cache = index_places(folder)
    try:
        place.mkdir(exist_ok=True)
        lock = open(place / "lock", "w")
    except OSError as error:
        print(f"{folder}: {error.strerror}; its index goes to {cache} (XDG_CACHE_HOME)")
        place = cache
        place.mkdir(parents=True, exist_ok=True)
        lock = open(place / "lock", "w")
    draft = place / f".{name}"
    with lock:  # released when the file closes, also by a crash
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            print(f"{lock.name}: {error.strerror}; going on without a lock")
            draft = place / f".{name}.{os.uname().nodename}.{os.getpid()}"  # no other's
        yield draft


def _build(folder, name, draft, tokenizer):
    """Index the shards one by one, join the parts, and put the whole in place at once."""
    shards = find_shards(folder)
    draft.mkdir(exist_ok=True)
    parts, jobs, todo_size = [], [], 0
    for shard, (size, digest) in shards.items():
        # a part's name says what it was made from: those of an interrupted build serve again
        part = draft / f"{shard.replace('/', '+')}.{size}.{digest}.npz"
        parts.append(part)
        if not part.exists():
            jobs.append((shard, part))
            todo_size += size
    progress = Progress("indexing", len(parts), "shards", done=len(parts) - len(jobs))
    work = partial(_index_shard, folder, tokenizer)
    for _ in in_order(work, jobs, workers_for(len(jobs), todo_size)):
        progress.add()
    lengths, digests, problems = _join(draft, parts)
    if not lengths["samples"]:
        raise ValueError(f"{folder} holds no usable pair:{''.join(report(problems)[:5])}")
    sizes = [(shard, size) for shard, (size, _) in shards.items()]
    digest = hashlib.sha256(repr(sizes).encode() + digests.encode()).hexdigest()[:16]
    index = {"format": FORMAT, "fingerprint": digest, "shards": shards,
             "samples": lengths["samples"], "problems": problems}
    (draft / "index.json").write_text(json.dumps(index, indent=1))
    for part in draft.glob("*.npz"):
        part.unlink()
    target = draft.parent / name
    if find_index(folder, name) is None:  # else, without locks, another process was first
        shutil.rmtree(target, ignore_errors=True)  # processes that have mapped it keep it
        draft.rename(target)
    shutil.rmtree(draft, ignore_errors=True)
    print(f"indexed {folder}: {lengths['samples']:,} pairs with {lengths['starts']:,} "
          f"captions, fingerprint {digest}", *report(problems), sep="\n", flush=True)
    return target, index


def workers_for(jobs, total_bytes):
    """How many processes pay for themselves when they read so many shards of so many bytes."""
    return min(os.cpu_count(), jobs, 1 + total_bytes // BYTES_A_PROCESS)


def _index_shard(folder, tokenizer, job):
    """Index one shard into a part file; offsets of keys, captions and ids start at 0 in it."""
    shard, part = job
    samples, problems = read_shard(folder, shard)
    rows, keys, captions = [], bytearray(), []
    for key, image_at, image_size, text_at, text_size, is_json, lines in samples:
        rows.append((0, len(lines), image_at, image_size, text_at, text_size, len(captions),
                     len(keys), len(key), is_json))  # as SAMPLE
        keys += key
        captions += lines
    rows = np.array(rows, SAMPLE)
    encoded = tokenizer.encode(captions) if tokenizer and captions else [[]] * len(captions)
    ids, starts = [], []
    for some in encoded:
        starts.append(len(ids))
        ids += some
    digest = hashlib.sha256(rows.tobytes() + keys + "\n".join(captions).encode())
    unfinished = part.with_name(f"{part.name}.{os.getpid()}.tmp")
    with open(unfinished, "wb") as file:
        np.savez(file, samples=rows, keys=np.frombuffer(keys, np.uint8),
                 ids=np.array(ids, np.uint16), starts=np.array(starts, np.uint64),
                 digest=digest.hexdigest(), problems=json.dumps(problems))
    unfinished.rename(part)


def _join(draft, parts):
    """Copy the parts one after another into ARRAYS on disk.

    Returns {array: length}, the parts' digests in a row, and {reason: {"count", "examples"}}.
    """
    lengths = Counter()
    for path in parts:
        with np.load(path) as part:
            for name in ARRAYS:
                lengths[name] += len(part[name])
    arrays = {}
    for name, kind in ARRAYS.items():
        room = lengths[name] + (name == "starts")  # the last of them is an end
        arrays[name] = open_memmap(draft / f"{name}.npy", "w+", kind, (room,))
    done, digests, problems = Counter(), "", {}
    for number, path in enumerate(parts):
        with np.load(path) as part:
            new = {name: part[name] for name in ARRAYS}
            digests += part["digest"].item()
            add_problems(problems, json.loads(part["problems"].item()))
        new["samples"]["shard"] = number
        new["samples"]["key_at"] += np.uint64(done["keys"])
        new["samples"]["first_caption"] += np.uint64(done["starts"])
        new["starts"] += np.uint64(done["ids"])
        for name, some in new.items():
            arrays[name][done[name]:done[name] + len(some)] = some
            done[name] += len(some)
    arrays["starts"][-1] = done["ids"]
    for array in arrays.values():
        array.flush()
    return lengths, digests, problems
