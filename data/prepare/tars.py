"""Writes tars, shards and evaluation sets: whole or not at all, the same bytes every time."""
import io
import multiprocessing
import os
import shutil
import tarfile
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path

import numpy as np

def write_tar(path, members):
    """Write (name, bytes) members to a tar, always the same bytes; return how many."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    unfinished, count = Path(f"{path}.{os.getpid()}.tmp"), 0
    try:
        with open(unfinished, "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for name, content in members:
                    info = tarfile.TarInfo(name)  # owner, group and time are 0
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                    count += 1
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def write_shards(folder, samples, per_shard=10_000):
    """Write samples (key, kind, image bytes, captions) to 00000.tar, ...; return how many.

    key: without a dot in its last part. kind: one of IMAGE_KINDS. captions: str or None; white
    space becomes single spaces, lone surrogates become "?", None and blank ones are left out.
    Indexing counts and names what is amiss. Raises ValueError for a folder that has shards.
    """
    if any(Path(folder).glob("*.tar")):
        raise ValueError(f"{folder} holds .tar files already; delete them or name another")
    members = shard_members(samples)  # two of each sample
    return sum(_write_tars(folder, members, 2 * per_shard, digits=5)) // 2


def _write_tars(folder, members, per_tar, digits):
    """Write members to 0.tar, 1.tar ... with so many digits; return the members of each."""
    members, counts = iter(members), []
    for first in members:  # taken here, so that no tar is empty
        some = chain([first], islice(members, per_tar - 1))
        counts.append(write_tar(Path(folder, f"{len(counts):0{digits}}.tar"), some))
    return counts


def shard_members(samples):
    """Yield the members (name, bytes) of write_shards' samples: the image, then its captions."""
    for key, kind, image, captions in samples:
        yield f"{key}.{kind}", image
        lines = [" ".join((caption or "").split()) for caption in captions]
        text = "".join(f"{line}\n" for line in lines if line)
        yield f"{key}.txt", text.encode(errors="replace")


def write_set(folder, name, classnames, templates, samples, family=None,
              dataset_type="classification", per_shard=10_000):
    """Write folder/wds_<name>_test as data/benchmarks.py reads it, whole or not at all.

    samples: (key, extension, image bytes, label); label: int, list of captions (retrieval), or
    (C,) array of 0 and 1 (multilabel). family: that it is averaged in. Returns its path.
    """
    target = os.path.join(folder, f"wds_{name}_test")
    if os.path.exists(target):
        raise ValueError(f"{target}: exists; remove it to write it anew")
    draft = Path(folder, f".{name}.tmp")  # find_sets passes it over
    shutil.rmtree(draft, ignore_errors=True)  # left by an interrupted run
    members = _set_members(samples, dataset_type)
    shards = len(_write_tars(draft / "test", members, 2 * per_shard, digits=1))
    texts = {"dataset_type": dataset_type, "test/nshards": str(shards)}
    if family:
        texts["family"] = family
    if dataset_type != "retrieval":
        texts["classnames"] = "\n".join(classnames)
        texts["zeroshot_classification_templates"] = "\n".join(templates)
    for file_name, text in texts.items():
        Path(draft, f"{file_name}.txt").write_text(text + "\n", encoding="utf-8")
    os.replace(draft, target)
    return target


def _set_members(samples, dataset_type):
    for key, extension, image, label in samples:
        yield f"{key}.{extension}", image
        if dataset_type == "classification":
            yield f"{key}.cls", str(int(label)).encode()
        elif dataset_type == "retrieval":
            yield f"{key}.txt", "\n".join(label).encode()
        else:
            buffer = io.BytesIO()
            np.save(buffer, np.asarray(label, np.uint8))
            yield f"{key}.npy", buffer.getvalue()


def in_order(function, inputs, workers):
    """map(function, inputs) over processes: results in order, a bounded number under way."""
    if workers <= 1:
        yield from map(function, inputs)
        return
    # a forked copy of a process with threads can hang; "spawn" costs 2 s if it imports torch
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    inputs = iter(inputs)
    try:
        running = deque(pool.submit(function, item) for item in islice(inputs, 8 * workers))
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(function, item) for item in islice(inputs, 1))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C no other job begins
