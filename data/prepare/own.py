"""Your own images and captions -> shards that pretrain.py reads.

    python -m data.prepare.own IMAGES TARGET --captions=captions.csv   # columns file,caption; or .jsonl
    python -m data.prepare.own IMAGES TARGET --captions=beside         # dog.txt describes dog.png
    python -m data.prepare.own IMAGES TARGET --captions=names          # from the names of files, folders

IMAGES is searched with its subfolders. Files in a .csv or .jsonl (one {"file": ..., "caption": ...}
a line) are relative to IMAGES; several rows of a file, or a list in .jsonl, are several captions,
of which training draws one. Beside a picture, the first line counts, or with --lines=all each line.
"names" turns birds/grey_heron_02.png into "grey heron, birds".

Pictures whose short side exceeds --short_side are shrunk to it and stored as JPEG; smaller JPEG,
PNG and WebP files are stored as they are. --held_out=0.05 puts that share into TARGET/held_out,
chosen by a hash of the file's name: it stays out however often you pack, and whatever you add.

TARGET gets NAME-00000.tar ... (NAME: --name, else the folder's own), so several packs can share it;
NAME.json counts pairs and skips, NAME.skipped.tsv names each skipped file and the reason. Of equal
files only the first is taken. Nothing appears in TARGET before everything is done. Memory: the
captions, 100 bytes a picture, and 8 pictures a process.
"""
import argparse
import csv
import glob
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

from PIL import Image

from data.images import BadImage, load_rgb, open_image
from data.log import Progress, run_main
from data.prepare.tars import in_order, write_shards

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that are stored as they are
# Column names for the picture's file and its caption: ours, then those of common data sets.
FILE_COLUMNS = ("file", "file_name", "filepath", "image")
CAPTION_COLUMNS = ("caption", "text", "title")


# ---------------------------------------------------------------------------- pictures

def shrink(data, short_side=256, quality=90):
    """Image bytes -> (kind, bytes) with the shorter side at most `short_side` pixels.

    Every picture is decoded, also one that is kept as it is. Raises BadImage (data/images.py).
    """
    image = open_image(data)
    kind = KEPT.get(image.format)
    image = load_rgb(image)
    width, height = image.size
    scale = short_side / min(width, height)
    if scale >= 1 and kind:
        return kind, data
    if scale < 1:
        size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return "jpg", file.getvalue()


def shrink_file(path, short_side, quality):
    """A file -> (kind, bytes, digest of the original), or the reason why not as a str."""
    try:
        data = Path(path).read_bytes()
        return *shrink(data, short_side, quality), hashlib.sha256(data).digest()
    except BadImage as error:
        return error.reason
    except OSError:  # a dangling link, no permission
        return "unreadable file"


# ---------------------------------------------------------------------------- captions

def find_pictures(folder):
    """Paths of all picture files below `folder`, relative and with "/", sorted."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found = []
    for place, _, names in os.walk(folder):
        found += [Path(place, name).relative_to(folder).as_posix() for name in names
                  if Path(name).suffix.lower() in SUFFIXES]
    if not found:
        raise FileNotFoundError(f"{folder}: no picture in it ({', '.join(sorted(SUFFIXES))})")
    return sorted(found)


def listed_captions(file):
    """{picture: [captions]} of a .csv or .jsonl file."""
    rows = csv_rows(file) if file.suffix == ".csv" else json_rows(file)
    captions = {}
    try:
        # rows are counted as a spreadsheet does, the header of a .csv being row 1
        for number, row in enumerate(rows, 2 if file.suffix == ".csv" else 1):
            name = next((row[column] for column in FILE_COLUMNS if row.get(column)), None)
            texts = next((row[column] for column in CAPTION_COLUMNS if column in row), 0)
            texts = texts if isinstance(texts, list) else [texts]
            if not isinstance(name, str) or not all(isinstance(t, str | None) for t in texts):
                raise ValueError(f"{file}, row {number}: needs a file ({', '.join(FILE_COLUMNS)}) "
                                 f"and a caption ({', '.join(CAPTION_COLUMNS)}), both text")
            captions.setdefault(Path(name).as_posix(), []).extend(texts)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: not readable as UTF-8 ({error})") from None
    return captions


def csv_rows(file):
    """Rows of a CSV with a header as dicts; a byte-order mark is no part of the first name."""
    with open(file, newline="", encoding="utf-8-sig") as lines:
        yield from csv.DictReader(lines)


def json_rows(file):
    """Objects of a .jsonl file, one a line."""
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, row {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}, row {number}: not an object: {line.strip()[:40]}")
            yield row


def caption_beside(images, name, lines):
    """Captions of the .txt beside a picture, or the reason why there are none as a str."""
    try:
        text = (images / name).with_suffix(".txt").read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return "no caption file"
    except UnicodeDecodeError:
        return "caption is not UTF-8"
    return text.splitlines() if lines == "all" else text.splitlines()[:1]


def caption_of_names(name):
    """"animals/bugs/flying_wasp_02.png" -> "flying wasp, bugs, animals"."""
    parts = [[word for word in re.split(r"[\W_]+", part) if word and not word.isdigit()]
             for part in Path(name).with_suffix("").parts]  # [[word, ...] of each folder, of file]
    return ", ".join(" ".join(words) for words in reversed(parts) if words)


def find_captions(images, names, source, lines):
    """-> [(picture, captions)] of what is usable, and [(file, reason)] of the rest."""
    if source == "beside":
        found = {name: caption_beside(images, name, lines) for name in names}
    elif source == "names":
        found = {name: [caption_of_names(name)] for name in names}
    elif Path(source).suffix in (".csv", ".jsonl"):
        listed = listed_captions(Path(source))
        found = {name: listed.pop(name, "not in the caption file") for name in names}
        found |= dict.fromkeys(listed, "no such picture")
    else:
        raise ValueError(f"--captions={source}: must be FILE.csv, FILE.jsonl, beside or names")
    usable, skipped = [], []
    for name, captions in found.items():
        if not isinstance(captions, str):
            captions = [text for text in captions if text and text.strip()] or "empty caption"
        if isinstance(captions, str):
            skipped.append((name, captions))
        else:
            usable.append((name, captions))
    return usable, skipped


# ---------------------------------------------------------------------------- packing

def is_held_out(name, share):
    """Whether a picture belongs to the held-out share: a function of its name alone."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def packed(images, pairs, args, seen, skipped):
    """Yield write_shards' samples of [(picture, captions)]; append what is left out to skipped.

    seen: digests of the pictures so far. One that occurs again is left out, so that no held-out
    picture is a training picture under another name.
    """
    line = Progress("packing", len(pairs), "pictures")
    one = partial(shrink_file, short_side=args.short_side, quality=args.quality)
    results = in_order(one, [images / name for name, _ in pairs], args.workers)
    for number, ((name, captions), result) in enumerate(zip(pairs, results, strict=True)):
        line.add()
        if isinstance(result, str):
            skipped.append((name, result))
            continue
        kind, data, digest = result
        if digest in seen:
            skipped.append((name, "same picture again"))
            continue
        seen.add(digest)
        readable = re.sub(r"[^A-Za-z0-9-]+", "_", str(Path(name).with_suffix("")))[-60:]
        yield f"{number:07d}_{readable}", kind, data, captions


def pack(args):
    """Pack as the command's arguments say; returns the report: pairs, held_out, skipped counts."""
    images, target = args.images, args.target
    if not 0 <= args.held_out < 1:
        raise ValueError(f"--held_out={args.held_out}: must be a share, at least 0 and below 1")
    if any(target.glob(f"{glob.escape(args.name)}-[0-9]*.tar")):
        raise ValueError(f"{target} has {args.name}-*.tar already; remove them or give --name")
    pairs, skipped = find_captions(images, find_pictures(images), args.captions, args.lines)
    draft, seen, report = target / f"{args.name}.unfinished", set(), {}
    if draft.exists():  # of an interrupted run
        shutil.rmtree(draft)
    draft.mkdir(parents=True)
    for part, held_out in (("", False), ("held_out", True)):
        chosen = [pair for pair in pairs if is_held_out(pair[0], args.held_out) == held_out]
        samples = packed(images, chosen, args, seen, skipped)
        report[part or "pairs"] = write_shards(draft / part, samples, args.per_shard)
    for shard in sorted(draft.rglob("*.tar")):
        place = target / shard.relative_to(draft).parent
        place.mkdir(exist_ok=True)
        os.replace(shard, place / f"{args.name}-{shard.name}")
    shutil.rmtree(draft)
    report["skipped"] = dict(Counter(reason for _, reason in skipped).most_common())
    report["settings"] = vars(args)
    (target / f"{args.name}.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    with open(target / f"{args.name}.skipped.tsv", "w", errors="surrogateescape") as file:
        file.writelines(f"{name}\t{reason}\n" for name, reason in sorted(skipped))
    return report


def main(argv=None):
    parser = argparse.ArgumentParser("python -m data.prepare.own", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of pictures")
    parser.add_argument("target", type=Path, help="folder for the shards")
    parser.add_argument("--captions", required=True, help="FILE.csv, FILE.jsonl, beside or names")
    parser.add_argument("--lines", choices=("first", "all"), default="first",
                        help="of the text beside a picture: its caption, or its captions")
    parser.add_argument("--name", help="first part of the shards' names; default: IMAGES' name")
    parser.add_argument("--held_out", type=float, default=0.0, help="share of pairs, 0 to 1")
    parser.add_argument("--short_side", type=int, default=256, help="pixels, at most")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--per_shard", type=int, default=10_000, help="pairs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    args.name = args.name or args.images.resolve().name
    report = pack(args)
    print(f"{args.target}: {report['pairs']:,} pairs and {report['held_out']:,} held out; "
          f"{sum(report['skipped'].values()):,} files skipped")
    for reason, count in report["skipped"].items():
        print(f"{count:>9,}  {reason}")
    if not report["pairs"]:
        raise ValueError(f"{args.images}: nothing could be packed; {args.target}/{args.name}."
                         "skipped.tsv has a reason for each file")


if __name__ == "__main__":
    run_main(main)
