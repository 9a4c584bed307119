"""Writes tars, shards and evaluation sets: whole or not at all, the same bytes every time."""
import io
import itertools
import multiprocessing
import os
import shutil
import tarfile
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from data.shards import IMAGE_KINDS, replacing

LABEL_TYPE = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}


def write_tar(path, members):
    """Write (name, bytes) members to a tar: whole or not at all, and the same bytes every time."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)  # owner, group and time are 0
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shards(folder, samples, per_shard=10_000):
    """Write samples (key, kind, image bytes, captions) to 00000.tar, ...; return how many.

    kind: one of IMAGE_KINDS. captions: str or None; white space becomes single spaces (a line is a
    caption), lone surrogates become "?", None and blank ones are left out. A sample left without a
    caption is written all the same: indexing counts and names it. Raises ValueError for a key or a
    kind that would not be found again, and for a folder that has shards (two runs would mix).
    """
    folder = Path(folder)
    if any(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds .tar files already; delete them or name another folder")
    written, samples = 0, iter(samples)
    for shard, first in enumerate(samples):  # taking the first here, so that no shard is empty
        counted = Counter()
        some = itertools.chain([first], itertools.islice(samples, per_shard - 1))
        write_tar(folder / f"{shard:05d}.tar", _members_of(some, counted))
        written += counted["samples"]
    return written


def _members_of(samples, counted):
    for key, kind, image, captions in samples:
        if "." in key.rpartition("/")[2] or kind not in IMAGE_KINDS:
            raise ValueError(f"key={key!r}, kind={kind!r}: a key has no dot in its last part, "
                             f"a kind is one of {', '.join(IMAGE_KINDS)}")
        lines = [" ".join(caption.split()) for caption in captions if caption is not None]
        text = "".join(line + "\n" for line in lines if line)
        yield f"{key}.{kind}", image
        yield f"{key}.txt", text.encode(errors="replace")
        counted["samples"] += 1


def write_set(folder, name, classnames, templates, samples, family=None,
              dataset_type="classification", per_shard=10_000):
    """Write folder/wds_<name>_test in the layout above, whole or not at all; returns its path.

    samples: iterable of (key, extension, image bytes, label); label: int, list of captions
    (retrieval), or (C,) array of 0 and 1 (multilabel).  family: the row group it is averaged in.
    """
    target = os.path.join(folder, f"wds_{name}_test")
    if os.path.exists(target):
        raise ValueError(f"{target}: exists; remove it to write it anew")
    draft = os.path.join(folder, f".{name}.tmp")  # find_sets passes it over
    shutil.rmtree(draft, ignore_errors=True)  # left by an interrupted run
    os.makedirs(os.path.join(draft, "test"))
    texts = {"dataset_type.txt": dataset_type}
    if family:
        texts["family.txt"] = family
    if dataset_type != "retrieval":
        texts["classnames.txt"] = "\n".join(classnames)
        texts["zeroshot_classification_templates.txt"] = "\n".join(templates)
    members, shards = [], 0
    for key, extension, image, label in samples:
        members.append((f"{key}.{extension}", image))
        members.append((f"{key}.{LABEL_TYPE[dataset_type]}", _label_bytes(dataset_type, label)))
        if len(members) == 2 * per_shard:
            write_tar(os.path.join(draft, "test", f"{shards}.tar"), members)
            members, shards = [], shards + 1
    if members:
        write_tar(os.path.join(draft, "test", f"{shards}.tar"), members)
        shards += 1
    for file_name, text in {**texts, "test/nshards.txt": str(shards)}.items():
        with open(os.path.join(draft, file_name), "w", encoding="utf-8") as file:
            file.write(text + "\n")
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
    if workers == 1:
        yield from map(function, inputs)
        return
    # "spawn", although it imports torch anew (2 s): a forked copy of a process that has used
    # torch's threads can hang
    context, inputs = multiprocessing.get_context("spawn"), iter(inputs)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running = deque(pool.submit(function, item) for item in islice(inputs, 8 * workers))
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(function, item) for item in islice(inputs, 1))
