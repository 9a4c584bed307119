"""YFCC15M as released (Kaichengalex/YFCC15M) -> shards: 15,061,515 recaptioned pairs, 1.12 TB.

    python -m data.prepare.yfcc15m SOURCE TARGET --vocabulary=data/clip.tiktoken

SOURCE: Kaichengalex/YFCC15M on the Hugging Face hub (or its address), or a folder of .parquet
files. It takes `pip install huggingface_hub pyarrow`. TARGET gets one tar a parquet file, of
the same name, with pictures at a short side of 256 (JPEG, quality 90) and captions as text;
TARGET/done/NAME.json when the tar is complete, and report.json, the sum of these. A stopped run
goes on at the files that are not done; its tars equal those of an uninterrupted run.

Columns: `images`, the bytes of an image file, and `texts`, k x 77 CLIP token ids: k captions,
each start, words, end, zeros. A caption is decoded and encoded again, and counted where the ids
differ (cut within a word, say). A file in which more than a tenth of the rows is skipped or
differs fails: then vocabulary or data are not what they should be. Scratch: 0.75 GB a process
while a file is fetched and converted, in TARGET/fetched.
"""
import functools
import importlib.util
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs import load_config
from data.images import BadImage
from data.log import Progress, run_main
from data.prepare.hub import dataset_name, fetch_file, list_files
from data.prepare.own import shrink
from data.prepare.tars import in_order, write_tar
from data.text import Tokenizer

FILES, ROWS = 1_507, 15_061_515  # of the release (its data card)
CONTEXT = 77                     # ids a caption
MAX_BAD = 0.1                    # share of a file's rows
EXAMPLES = 5                     # rows named for each reason in done/NAME.json
DIFFERENT = "captions that encode differently"


@dataclass
class Config:
    vocabulary: str = "data/clip.tiktoken"  # CLIP's, by data.prepare.vocabulary
    files: int = 0                          # only the first so many, to try it out; 0: all
    workers: int = min(8, os.cpu_count())   # processes


class BadRow(ValueError):
    """A row, or a caption of it, that cannot be used: str() is a reason that can be counted."""


@functools.cache
def tokenizer_of(path):
    """One tokenizer a process: building CLIP's takes a second."""
    return Tokenizer(path)


def read_caption(ids, tokenizer):
    """(77,) ids -> (text, whether encoding it gives these ids again). Raises BadRow."""
    if ids.min() < 0 or ids.max() > tokenizer.end:
        raise BadRow("token id out of range")
    if ids[0] != tokenizer.start:
        raise BadRow("wrong first token id")
    ends = np.flatnonzero(ids == tokenizer.end)
    end = ends[0] if len(ends) else CONTEXT  # an early tokenizer cut captions without an end
    if ids[end + 1:].any():
        raise BadRow("token ids after the end")
    words = ids[1:end].tolist()
    text = " ".join(tokenizer.decode(words).split())  # a caption is one line of a shard
    if not text:
        raise BadRow("empty caption")
    return text, tokenizer.encode([text])[0] == words


def read_captions(ids, tokenizer, counts):
    """A row's ids (k * 77) -> its captions. Bad ones of several are counted; raises BadRow."""
    if not ids or len(ids) % CONTEXT:
        raise BadRow("token row is not k x 77 ids")
    if None in ids:
        raise BadRow("token id missing")
    table = np.array(ids).reshape(-1, CONTEXT)                       # (k, 77)
    captions, dropped = [], []
    for row in table[table.any(1)]:  # rows of zeros fill up where others have more captions
        try:
            text, same = read_caption(row, tokenizer)
        except BadRow as error:
            dropped.append(str(error))
            continue
        captions.append(text)
        counts["captions"] += 1
        counts[DIFFERENT] += not same
    if not captions:
        raise BadRow(dropped[0] if dropped else "empty caption")
    for reason in dropped:
        counts[f"dropped caption: {reason}"] += 1
    return captions


def read_rows(path):
    """Yield (image bytes, list of ids) of a parquet file, with a few dozen rows in memory."""
    from pyarrow import parquet
    # Streamed: a row group can be the whole file, and then 714 MB of it took 0.97 GB, now 0.3
    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        columns = {field.name: str(field.type) for field in file.schema_arrow}
        if columns.get("images") not in ("binary", "large_binary") or "texts" not in columns:
            raise ValueError(f"columns are {columns}, must be images (binary) and texts (ids)")
        for batch in file.iter_batches(batch_size=32, columns=["images", "texts"]):
            for row in batch.to_pylist():
                yield row["images"], row["texts"]


def members(rows, name, tokenizer, counts, skipped):
    """Yield a tar's members from (bytes, ids) rows; fill counts and {reason: [row numbers]}."""
    for number, (image, ids) in enumerate(rows):
        counts["rows"] += 1
        try:
            captions = read_captions(ids, tokenizer, counts)
            kind, data = shrink(image or b"", short_side=256, quality=90)
        except (BadRow, BadImage) as error:
            skipped.setdefault(str(error), []).append(number)
            continue
        counts["pairs"] += 1
        key = f"{name.replace('.', '_')}_{number:06d}"
        yield f"{key}.{kind}", data
        yield f"{key}.txt", "".join(f"{caption}\n" for caption in captions).encode()
    reasons = {reason: len(numbers) for reason, numbers in skipped.items()}
    reasons[DIFFERENT] = counts[DIFFERENT]
    if sum(reasons.values()) > MAX_BAD * counts["rows"]:  # raised here, the tar never appears
        raise ValueError(f"too much is wrong in {counts['rows']:,} rows: {reasons}; is the "
                         "vocabulary CLIP's?")


def convert_file(file, fetch, target, vocabulary):
    """One parquet file -> target/NAME.tar and done/NAME.json.

    fetch makes a local Path of `file` (find_sources). Returns None, or what went wrong as a
    str: other files can still be converted.
    """
    name, counts, skipped, path = Path(file).stem, Counter(), {}, None
    try:
        path = fetch(file)
        found = members(read_rows(path), name, tokenizer_of(vocabulary), counts, skipped)
        write_tar(target / f"{name}.tar", found)
    except (ValueError, OSError) as error:  # OSError: a truncated parquet file, or a full disk
        return f"{name}: {error}"
    finally:
        if path and fetch is not Path:
            path.unlink()
    counts["skipped"] = {reason: len(numbers) for reason, numbers in skipped.items()}
    counts["examples"] = {reason: numbers[:EXAMPLES] for reason, numbers in skipped.items()}
    part = target / "done" / f"{name}.part"
    part.write_text(json.dumps(counts, indent=2) + "\n")
    os.replace(part, part.with_suffix(".json"))


def find_sources(source, scratch):
    """The parquet files of a folder or a data set, sorted, and what makes a local Path of one.

    scratch: folder that fetched files go to.
    """
    if Path(source).is_dir():
        files, fetch = list(Path(source).rglob("*.parquet")), Path
    elif "://" in source or source.count("/") == 1:
        name = dataset_name(source)
        commit, sizes = list_files(name)
        files = [path for path in sizes if path.endswith(".parquet")]
        fetch = functools.partial(fetch_file, name, commit, folder=scratch, progress=False)
    else:
        raise FileNotFoundError(f"{source}: no such folder")
    if not files:
        raise FileNotFoundError(f"{source}: no .parquet file in it")
    for name, times in Counter(Path(file).stem for file in files).items():
        if times > 1:
            raise ValueError(f"{source}: {name}.parquet is there {times} times; shards are "
                             "named after the files")
    return sorted(files, key=lambda file: Path(file).stem), fetch


def sum_up(target):
    """Add up target/done/*.json, write target/report.json and return it."""
    total = Counter(files=0)
    for path in sorted((target / "done").glob("*.json")):
        done = json.loads(path.read_text())
        total["files"] += 1
        total.update({key: value for key, value in done.items() if isinstance(value, int)})
        total.update({f"skipped: {reason}": n for reason, n in done["skipped"].items()})
    (target / "report.json").write_text(json.dumps(total, indent=2) + "\n")
    return total


def main(argv=None):
    config, others = load_config(Config, globals(), argv)
    if len(others) != 2:
        raise ValueError("write: python -m data.prepare.yfcc15m SOURCE TARGET [--key=value]")
    if not importlib.util.find_spec("pyarrow"):
        raise ValueError("parquet files are read by pyarrow: pip install pyarrow")
    Tokenizer(config.vocabulary)  # a wrong path shows now, not in each process
    target = Path(others[1])
    files, fetch = find_sources(others[0], target / "fetched")
    files = files[:config.files or None]
    (target / "done").mkdir(parents=True, exist_ok=True)
    for stale in target.glob("*.tar.*.tmp"):  # of a run that was killed
        stale.unlink()
    done = {path.stem for path in (target / "done").glob("*.json")}
    todo = [file for file in files if Path(file).stem not in done]

    failed = []
    progress = Progress("files", len(files), "files", done=len(files) - len(todo))
    convert = functools.partial(convert_file, fetch=fetch, target=target,
                                vocabulary=config.vocabulary)
    for problem in in_order(convert, todo, config.workers):
        if problem:
            failed.append(problem)
            print(problem, flush=True)
        progress.add()

    for key, number in sum_up(target).items():
        print(f"{number:>14,}  {key}")
    print(f"The release has {ROWS:,} rows in {FILES:,} files.")
    if failed:
        raise ValueError(f"{len(failed)} of {len(files)} files failed, the first: {failed[0]}; "
                         "the same command tries them again")
    shutil.rmtree(target / "fetched", ignore_errors=True)  # what the library noted of the files


if __name__ == "__main__":
    run_main(main)
