"""Builds the index of a folder of shards (data/shards.py): what tars hold, and their faults.

A key is a member's path up to the first dot of its last part, as webdataset has it. The parts
of a sample need not be neighbours. What is left out, or odd but kept, is counted and named.

A million pairs take one to two core-minutes and 0.2 GB of memory. An interrupted build goes on
after the shards that it has finished.
"""
import fcntl
import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from data.log import Progress, index_folder
from data.prepare.tars import in_order
from data.shards import (FORMAT, IMAGE_KINDS, SAMPLE, caption_lines, find_index, find_shards)

BYTES_A_PROCESS = 2**28  # below 256 MB one more process costs more to start than it saves
EXAMPLES = 5  # names kept for each reason
# These samples are kept; those of all other reasons are left out:
FROM_JSON = "caption from .json"
KEPT = ("duplicate key", "caption not UTF-8", FROM_JSON)


def read_members(path):
    """The whole regular files of a tar, and where it breaks off.

    Returns [(name as bytes, offset, size), ...] in the tar's order, and None for a whole tar;
    else the name of the last whole member, b"" if there is none.
    """
    members, last, whole = [], b"", False
    length = os.path.getsize(path)
    with open(path, "rb") as file, suppress(tarfile.TarError):
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            for member in tar:
                if not 0 <= member.size <= length - member.offset_data:
                    return members, last
                last = member.name.encode(errors="surrogateescape")
                if member.isreg():
                    members.append((last, member.offset_data, member.size))
            # At a damaged header tarfile stops without a word. A whole tar ends in zeros.
            rest = os.pread(file.fileno(), 2**20, tar.offset)
            whole = len(rest) >= 512 and not rest.strip(b"\0")
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
    images, texts, jsons, samples, problems = {}, {}, {}, [], []
    tables = dict.fromkeys(IMAGE_KINDS, images) | {"txt": texts, "json": jsons}
    members, last = read_members(Path(folder, shard))
    for name, at, size in members:
        key, kind = split_name(name)
        if key and kind not in tables:
            problems.append(("unknown kind after the first dot", name))
        elif key and key in tables[kind]:
            problems.append(("duplicate key", name))
        elif key:
            tables[kind][key] = (at, size)
    if last is not None:
        problems.append(("tar cut off", b"all after " + last if last else b"all"))
    with open(Path(folder, shard), "rb") as file:
        for key, (image_at, image_size) in images.items():
            is_json = key not in texts
            if is_json and key not in jsons:
                problems.append(("image without caption", key))
                continue
            at, size = jsons[key] if is_json else texts.pop(key)
            captions = caption_lines(os.pread(file.fileno(), size, at), is_json)
            if not captions:
                problems.append(("empty caption", key))
                continue
            samples.append((key, image_at, image_size, at, size, is_json, captions))
            if is_json:
                problems.append((FROM_JSON, key))
            if any("\ufffd" in caption for caption in captions):
                problems.append(("caption not UTF-8", key))
    problems += [("caption without image", key) for key in texts]
    return samples, [(reason, f"{shard}:{name.decode(errors='replace')}")
                     for reason, name in problems]


def add_problems(total, some):
    """Add [(reason, name), ...] to {reason: {"count", "examples"}}."""
    for reason, name in some:
        entry = total.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if entry["count"] <= EXAMPLES:
            entry["examples"].append(name)


def report(problems):
    """A line for each reason: how often, what became of the samples, the first EXAMPLES."""
    lines = []
    for reason, entry in problems.items():
        fate = "kept" if reason in KEPT else "left out"
        names = ", ".join(entry["examples"])
        lines.append(f"  {entry['count']:,} x {reason} ({fate}): {names}")
    return lines


def build_index(folder, tokenizer):
    """Build the index that fits FOLDER's shards, once for all processes; see find_index.

    The first that is finished stays; a lock only saves the others' work. Raises ValueError
    without a usable pair.
    """
    name = tokenizer.fingerprint if tokenizer else "none"
    if tokenizer and tokenizer.size > 2**16:
        raise ValueError(f"vocabulary {name} has {tokenizer.size:,} ids; an index holds 65,536")
    place = index_folder(folder)
    draft = place / f".{name}"
    with open(place / "lock", "w") as lock:  # released when it closes, also by a crash
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            print(f"{lock.name}: {error.strerror}; going on without a lock")
            draft = place / f".{name}.{os.uname().nodename}.{os.getpid()}"  # no other's
        if find_index(folder, tokenizer) is None:
            _build(folder, tokenizer, draft, place / name)
    return find_index(folder, tokenizer)


def _build(folder, tokenizer, draft, target):
    """Index the shards one by one in `draft`, join the parts, and put the whole in place."""
    shards, parts = find_shards(folder), {}
    draft.mkdir(exist_ok=True)
    for shard, (size, digest) in shards.items():
        # a part's name says what it was made from: those of an interrupted build serve again
        parts[shard] = draft / f"{shard.replace('/', '+')}.{size}.{digest}.npz"
    todo = [(shard, part) for shard, part in parts.items() if not part.exists()]
    workers = workers_for(shards[shard][0] for shard, _ in todo)
    progress = Progress("indexing", len(parts), "shards", done=len(parts) - len(todo))
    for _ in in_order(partial(_index_shard, folder, tokenizer), todo, workers):
        progress.add()
    arrays, digests, problems = _join(parts.values())
    pairs, captions = len(arrays["samples"]), len(arrays["starts"]) - 1
    if not pairs:
        raise ValueError(f"{folder} holds no usable pair:{''.join(report(problems))}")
    sizes = [(shard, size) for shard, (size, _) in shards.items()]
    digest = hashlib.sha256(repr(sizes).encode() + digests.encode()).hexdigest()[:16]
    whole = draft / "whole"
    whole.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(whole / f"{name}.npy", array)
    index = {"format": FORMAT, "fingerprint": digest, "shards": shards, "samples": pairs,
             "problems": problems}
    (whole / "index.json").write_text(json.dumps(index, indent=1))
    if find_index(folder, tokenizer) is None:  # else another process was first
        shutil.rmtree(target, ignore_errors=True)  # processes that have mapped it keep it
        whole.rename(target)
    shutil.rmtree(draft)
    print(f"indexed {folder}: {pairs:,} pairs with {captions:,} captions, fingerprint {digest}",
          *report(problems), sep="\n", flush=True)


def workers_for(sizes):
    """How many processes pay for themselves when they read shards of so many bytes each."""
    return min(os.cpu_count(), 1 + sum(sizes) // BYTES_A_PROCESS)


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
    rows, ids, starts = np.array(rows, SAMPLE), [], []
    encoded = tokenizer.encode(captions) if tokenizer else [[]] * len(captions)
    for some in encoded:
        starts.append(len(ids))
        ids += some
    digest = hashlib.sha256(rows.tobytes() + keys + "\n".join(captions).encode())
    unfinished = part.with_suffix(".tmp.npz")
    np.savez(unfinished, samples=rows, keys=np.frombuffer(keys, np.uint8),
             ids=np.array(ids, np.uint16), starts=np.array(starts, np.uint64),
             digest=digest.hexdigest(), problems=json.dumps(problems))
    unfinished.rename(part)


def _join(parts):
    """The parts' arrays one after another, {name: array}; their digests; all problems."""
    columns = {"samples": [], "keys": [], "ids": [], "starts": []}
    at, digests, problems = Counter(), "", {}
    for number, path in enumerate(parts):
        with np.load(path) as file:
            part = dict(file)
        part["samples"]["shard"] = number
        part["samples"]["key_at"] += np.uint64(at["keys"])
        part["samples"]["first_caption"] += np.uint64(at["starts"])
        part["starts"] += np.uint64(at["ids"])
        digests += part["digest"].item()
        add_problems(problems, json.loads(part["problems"].item()))
        for name, arrays in columns.items():
            arrays.append(part[name])
            at[name] += len(part[name])
    columns["starts"].append(np.array([at["ids"]], np.uint64))  # where the last ids end
    return {name: np.concatenate(some) for name, some in columns.items()}, digests, problems
