"""YFCC15M as released (Kaichengalex/YFCC15M) -> shards: 15,061,515 recaptioned pairs, 1.12 TB.

    python -m data.prepare.yfcc15m SOURCE TARGET --vocabulary=data/clip.tiktoken

SOURCE: Kaichengalex/YFCC15M on the Hugging Face hub (or its address), or a folder of .parquet
files. TARGET gets a tar a parquet file, of the same name, done/NAME.json when it is complete,
and report.json, the sum of these. A stopped run goes on; its tars equal an uninterrupted run's.

Columns: `images`, the bytes of an image file, and `texts`, k x 77 CLIP token ids: k captions,
each start, words, end, zeros. A caption is decoded and encoded again, and counted where the ids
differ. A file of which more than a tenth is skipped or differs fails. It takes `pip install
huggingface_hub pyarrow` and, in TARGET/fetched, 0.75 GB of scratch a process.
"""
import importlib.util
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from configs import load_config
from data.log import Progress, run_main, write_text
from data.prepare.captions import parquet_rows
from data.prepare.hub import dataset_name, fetch_file, list_files
from data.prepare.own import shrink
from data.prepare.tars import in_order, shard_members, write_tar
from data.text import Tokenizer

CONTEXT = 77                     # ids a caption
MAX_BAD = 0.1                    # share of a file's rows
DIFFERENT = "captions that encode differently"


@dataclass
class Config:
    vocabulary: str = "data/clip.tiktoken"  # CLIP's, by data.prepare.vocabulary
    files: int = 0                          # only the first so many, to try it out; 0: all
    workers: int = min(8, os.cpu_count())   # processes


def read_caption(ids, tokenizer):
    """(77,) ids -> (text, whether encoding it gives these ids again). Raises ValueError."""
    if ids.min() < 0 or ids.max() > tokenizer.end:
        raise ValueError("token id out of range")
    if ids[0] != tokenizer.start:
        raise ValueError("wrong first token id")
    ends = np.flatnonzero(ids == tokenizer.end)
    end = ends[0] if len(ends) else CONTEXT  # an early tokenizer cut captions without an end
    if ids[end + 1:].any():
        raise ValueError("token ids after the end")
    words = ids[1:end].tolist()
    text = " ".join(tokenizer.decode(words).split())  # a caption is one line of a shard
    if not text:
        raise ValueError("empty caption")
    return text, tokenizer.encode([text])[0] == words


def read_captions(ids, tokenizer, counts):
    """A row's ids (k * 77) -> its captions; bad ones of several are counted.

    Raises ValueError if none is good.
    """
    if not ids or len(ids) % CONTEXT:
        raise ValueError("token row is not k x 77 ids")
    if None in ids:
        raise ValueError("token id missing")
    table = np.array(ids).reshape(-1, CONTEXT)                       # (k, 77)
    captions, dropped = [], []
    for row in table[table.any(1)]:  # rows of zeros fill up where others have more captions
        try:
            text, same = read_caption(row, tokenizer)
            captions.append(text)
            counts["captions"] += 1
            counts[DIFFERENT] += not same
        except ValueError as error:
            dropped.append(str(error))
    if not captions:
        raise ValueError(dropped[0] if dropped else "empty caption")
    counts.update(f"dropped caption: {reason}" for reason in dropped)
    return captions


def read_samples(path, name, tokenizer, counts, skipped):
    """Yield write_shards' samples of a parquet file; fill counts and {reason: [row numbers]}."""
    for number, row in enumerate(parquet_rows(path)):
        if not {"images", "texts"} <= row.keys():
            raise ValueError(f"columns are {', '.join(row)}, must be images and texts")
        counts["rows"] += 1
        try:
            captions = read_captions(row["texts"], tokenizer, counts)
            kind, data = shrink(row["images"], short_side=256, quality=90)
        except ValueError as error:  # BadImage is one
            skipped.setdefault(str(error), []).append(number)
            continue
        counts["pairs"] += 1
        yield f"{name.replace('.', '_')}_{number:06d}", kind, data, captions
    bad = counts["rows"] - counts["pairs"] + counts[DIFFERENT]
    if bad > MAX_BAD * counts["rows"]:  # raised here, the tar never appears
        reasons = {reason: len(numbers) for reason, numbers in skipped.items()}
        raise ValueError(f"too much is wrong in {counts['rows']:,} rows: {reasons}, "
                         f"{counts[DIFFERENT]} {DIFFERENT}; is the vocabulary CLIP's?")


def convert_file(file, fetch, target, tokenizer):
    """One parquet file, which fetch makes a local Path of -> target/NAME.tar, done/NAME.json.

    Returns None, or what went wrong as a str: other files can still be converted.
    """
    name, counts, skipped, path = Path(file).stem, Counter(), {}, None
    try:
        path = fetch(file)
        samples = read_samples(path, name, tokenizer, counts, skipped)
        write_tar(target / f"{name}.tar", shard_members(samples))
    except (ValueError, OSError) as error:  # OSError: a truncated parquet file, or a full disk
        return f"{name}: {error}"
    finally:
        if path and fetch is not Path:
            path.unlink()
    report = json.dumps({**counts, "skipped": skipped}, indent=2) + "\n"
    write_text(target / "done" / f"{name}.json", report)


def find_sources(source, scratch):
    """The parquet files of a folder or data set, sorted; what makes a local Path of one."""
    if Path(source).is_dir():
        files, fetch = list(Path(source).rglob("*.parquet")), Path
    else:
        name = dataset_name(source)
        commit, sizes = list_files(name)
        files = [path for path in sizes if path.endswith(".parquet")]
        fetch = partial(fetch_file, name, commit, folder=scratch, progress=False)
    names = {Path(file).stem for file in files}
    if not files or len(names) < len(files):
        raise ValueError(f"{source}: needs .parquet files, each of another name, as shards are "
                         f"named after them; has {len(files)} files of {len(names)} names")
    return sorted(files, key=lambda file: Path(file).stem), fetch


def main(argv=None):
    config, others = load_config(Config, globals(), argv)
    if len(others) != 2:
        raise ValueError("write: python -m data.prepare.yfcc15m SOURCE TARGET [--key=value]")
    if not importlib.util.find_spec("pyarrow"):
        raise ValueError("parquet files are read by pyarrow: pip install pyarrow")
    tokenizer = Tokenizer(config.vocabulary)
    target = Path(others[1])
    files, fetch = find_sources(others[0], target / "fetched")
    if config.files:
        files = files[:config.files]
    (target / "done").mkdir(parents=True, exist_ok=True)
    for stale in target.glob("*.tar.*.tmp"):  # of a run that was killed
        stale.unlink()
    done = {path.stem for path in (target / "done").glob("*.json")}
    todo = [file for file in files if Path(file).stem not in done]

    failed = []
    progress = Progress("files", len(files), "files", done=len(files) - len(todo))
    convert = partial(convert_file, fetch=fetch, target=target, tokenizer=tokenizer)
    for problem in in_order(convert, todo, config.workers):
        if problem:
            failed.append(problem)
            print(problem, flush=True)
        progress.add()

    total = Counter()
    for path in sorted((target / "done").glob("*.json")):
        counts = json.loads(path.read_text())
        total["files"] += 1
        for reason, numbers in counts.pop("skipped").items():
            total[f"skipped: {reason}"] += len(numbers)
        total.update(counts)
    (target / "report.json").write_text(json.dumps(total, indent=2) + "\n")
    for key, number in total.items():
        print(f"{number:>14,}  {key}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(files)} files failed, the first: {failed[0]}; "
                         "the same command tries them again")
    shutil.rmtree(target / "fetched", ignore_errors=True)  # what the library noted of the files


if __name__ == "__main__":
    run_main(main)
