"""Writes tars, shards and evaluation sets: whole or not at all, the same bytes every time."""
import io
import multiprocessing
import os
import shutil
import tarfile
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path

import numpy as np

from data.shards import IMAGE_KINDS

LABEL_TYPE = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}


def write_tar(path, members):
    """Write (name, bytes) members to a tar: whole or not at all, always the same bytes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for name, content in members:
                    info = tarfile.TarInfo(name)  # owner, group and time are 0
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_shards(folder, samples, per_shard=10_000):
    """Write samples (key, kind, image bytes, captions) to 00000.tar, ...; return how many.

    kind: one of IMAGE_KINDS. captions: str or None; white space becomes single spaces (a line
    is a caption), lone surrogates become "?", None and blank ones are left out. A sample left
    without a caption is written all the same: indexing counts and names it. Raises ValueError
    for a key or kind that would not be found again, and for a folder that has shards.
    """
    folder = Path(folder)
    if any(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds .tar files already; delete them or name another")
    samples, counted = iter(samples), Counter()
    for shard, first in enumerate(samples):  # taken here, so that no shard is empty
        some = chain([first], islice(samples, per_shard - 1))
        write_tar(folder / f"{shard:05d}.tar", _members_of(some, counted))
    return counted["samples"]


def _members_of(samples, counted):
    for key, kind, image, captions in samples:
        if "." in key.rpartition("/")[2] or kind not in IMAGE_KINDS:
            raise ValueError(f"key={key!r}, kind={kind!r}: a key has no dot in its last part, "
                             f"a kind is one of {', '.join(IMAGE_KINDS)}")
        yield f"{key}.{kind}", image
        text = ""
        for caption in captions:
            line = " ".join((caption or "").split())
            if line:
                text += line + "\n"
        yield f"{key}.txt", text.encode(errors="replace")
        counted["samples"] += 1


def write_set(folder, name, classnames, templates, samples, family=None,
              dataset_type="classification", per_shard=10_000):
    """Write folder/wds_<name>_test as data/benchmarks.py reads it, whole or not at all.

    samples: iterable of (key, extension, image bytes, label); label: int, list of captions
    (retrieval), or (C,) array of 0 and 1 (multilabel). family: the row group it is averaged in.
    Returns its path.
    """
    target = os.path.join(folder, f"wds_{name}_test")
    if os.path.exists(target):
        raise ValueError(f"{target}: exists; remove it to write it anew")
    draft = os.path.join(folder, f".{name}.tmp")  # find_sets passes it over
    shutil.rmtree(draft, ignore_errors=True)  # left by an interrupted run
    os.makedirs(os.path.join(draft, "test"))
    samples, shards = iter(samples), 0
    for first in samples:
        members = []
        for key, extension, image, label in chain([first], islice(samples, per_shard - 1)):
            members.append((f"{key}.{extension}", image))
            label = _label_bytes(dataset_type, label)
            members.append((f"{key}.{LABEL_TYPE[dataset_type]}", label))
        write_tar(os.path.join(draft, "test", f"{shards}.tar"), members)
        shards += 1
    texts = {"dataset_type.txt": dataset_type, "test/nshards.txt": str(shards)}
    if family:
        texts["family.txt"] = family
    if dataset_type != "retrieval":
        texts["classnames.txt"] = "\n".join(classnames)
        texts["zeroshot_classification_templates.txt"] = "\n".join(templates)
    for file_name, text in texts.items():
        Path(draft, file_name).write_text(text + "\n", encoding="utf-8")
    os.replace(draft, target)
    return target


def _label_bytes(dataset_type, label):
    if dataset_type == "retrieval":
        return "\n".join(label).encode()
    if dataset_type == "classification":
        return str(int(label)).encode()
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(label, dtype=np.uint8))
    return buffer.getvalue()


def in_order(function, inputs, workers):
    """map(function, inputs) over processes: results in order, a bounded number under way."""
    if workers <= 1:
        yield from map(function, inputs)
        return
    # "spawn", although a process may import torch anew (2 s): a forked copy of a process with
    # threads can hang
    context, inputs = multiprocessing.get_context("spawn"), iter(inputs)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running = deque(pool.submit(function, item) for item in islice(inputs, 8 * workers))
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(function, item) for item in islice(inputs, 1))
