"""Your own images and captions -> shards that pretrain.py reads.

    python -m data.prepare.own IMAGES TARGET --captions=captions.csv   # a table: file, caption
    python -m data.prepare.own IMAGES TARGET --captions=beside         # dog.txt describes dog.png
    python -m data.prepare.own IMAGES TARGET --captions=names          # from the names of files, folders
    python -m data.prepare.own IMAGES.parquet TARGET                   # pictures and captions in one file

IMAGES is searched with its subfolders, links included. What tables may look like is said in
data/prepare/captions.py; their files are relative to IMAGES, and several rows of a file are several
captions, of which training draws one. "beside" takes the first line; with --lines=all each line is a
caption, with --lines=one the whole file is. "names" turns birds/grey_heron_02.png into "grey heron,
birds". Equal pictures become one pair with the captions of all.

Pictures whose short side exceeds --short_side are shrunk to it and stored as JPEG; smaller JPEG,
PNG and WebP files are stored as they are. --held_out=0.05 puts that share into TARGET/held_out,
chosen by a hash of the file's name: it stays out however often you pack, and whatever you add.

TARGET gets NAME-00000.tar ... (NAME: --name, else the folder's own), so several packs can share it.
NAME.json counts pictures = pairs + held out + skipped by reason; NAME.skipped.tsv names each skipped
file and the reason. Nothing appears in TARGET before everything is done. Memory: the captions, 100
bytes a picture, and 8 pictures a process.
"""
import dataclasses
import glob
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from configs import load_config
from data.images import BadImage, load_rgb, open_image
from data.log import Progress, run_main
from data.prepare.captions import match_names, parquet_pictures, picture_column, read_captions
from data.prepare.tars import in_order, write_shards

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that are stored as they are
SAME = "same picture again, its captions went to the first"
BREAKS = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # what ends a line somewhere


@dataclass
class Config:
    captions: str = ""       # a table, "beside" or "names"
    columns: str = ""        # FILE,CAPTION: names of a table's columns, where they are others
    lines: str = "first"     # of a text beside a picture: "first", "all" (a caption each), "one"
    name: str = ""           # first part of the shards' names; default: IMAGES' name
    held_out: float = 0.0    # share of the pairs, 0 to 1
    short_side: int = 256    # pixels, at most
    quality: int = 90        # of the JPEGs
    per_shard: int = 10_000  # pairs
    workers: int = os.cpu_count()  # processes

    def check(self):
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: must be a share, at least 0 and below 1")
        if self.lines not in ("first", "all", "one"):
            raise ValueError(f"lines={self.lines}: must be first, all or one")


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


def find_pictures(folder):
    """Names of all picture files below `folder`, relative and with "/", sorted.

    Links to folders are followed. Also returns [(folder, why it was not entered)].
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    names, passed = [], []
    _search(folder, "", (), names, passed)
    if not names:
        raise FileNotFoundError(f"{folder}: no picture in it ({', '.join(sorted(SUFFIXES))})")
    return sorted(names), passed


def _search(folder, place, above, names, passed):
    """Append the pictures of folder/place; above: the real paths of the folders on the way to it."""
    real = os.path.realpath(folder / place)
    if real in above:
        passed.append((place, "link to a folder that it lies in"))
        return
    try:
        entries = list(os.scandir(folder / place))
    except OSError:
        passed.append((place, "unreadable folder"))
        return
    for entry in entries:
        name = f"{place}/{entry.name}" if place else entry.name
        if entry.is_dir():
            _search(folder, name, (*above, real), names, passed)
        elif Path(name).suffix.lower() in SUFFIXES:
            names.append(name)


def prepare_picture(entry, short_side, quality):
    """(name, file or its bytes) -> (name, kind, bytes), or (name, None, the reason why not)."""
    name, source = entry
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        kind, data = shrink(data, short_side, quality)
    except BadImage as error:
        return name, None, error.reason
    except OSError:  # a dangling link, no permission
        return name, None, "unreadable file"
    return name, kind, data


def find_digests(images, names):
    """{name: sha256} of the files that can equal another: those whose size occurs again."""
    sizes = {}
    for name in names:
        try:
            sizes[name] = (images / name).stat().st_size
        except OSError:
            continue  # prepare_picture says that it is unreadable
    often = Counter(sizes.values())
    digests = {}
    for name, size in sizes.items():
        if often[size] > 1:
            with open(images / name, "rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").digest()
    return digests


# ---------------------------------------------------------------------------- captions

def captions_beside(images, names, lines, notes):
    """{name: [captions]} of the .txt files beside pictures, and {name: why there are none}."""
    found, skipped = {}, {}
    for name in names:
        try:
            text = (images / name).with_suffix(".txt").read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            skipped[name] = "no caption file"
            continue
        except UnicodeDecodeError:
            skipped[name] = "caption is not UTF-8"
            continue
        if lines == "one":
            found[name] = [text]
            continue
        rows = [row for row in text.split("\n") if row.strip()]  # \r\n was read as \n
        if len(rows) > 1:
            taken = "the first is taken" if lines == "first" else "each is a caption"
            notes[f"caption files have several lines: {taken} (--lines=first, all, or one: the "
                  "whole file is one caption)"] += 1
        found[name] = rows if lines == "all" else rows[:1]
    return found, skipped


def caption_of_names(name):
    """"animals/bugs/flying_wasp_02.png" -> "flying wasp, bugs, animals"."""
    phrases = []
    for part in reversed(Path(name).with_suffix("").parts):
        words = [word for word in re.split(r"[\W_]+", part) if word and not word.isdigit()]
        if words:
            phrases.append(" ".join(words))
    return ", ".join(phrases)


def find_captions(images, names, config, notes):
    """{name: [captions]}, {name: why there are none}, [(name in the table, why it is no picture)]."""
    if config.captions == "beside":
        found, skipped = captions_beside(images, names, config.lines, notes)
        return found, skipped, []
    if config.captions == "names":
        return {name: [caption_of_names(name)] for name in names}, {}, []
    if not Path(config.captions).is_file():
        raise FileNotFoundError(f"--captions={config.captions}: no such file; name a table of files "
                                "and captions, or write beside or names")
    table, more = read_captions(Path(config.captions), config.columns)
    notes.update(more)
    found, missing = match_names(table, names, images)
    return found, dict.fromkeys(set(names) - set(found), "not in the caption file"), missing


def choose_pairs(names, found, digests, skipped, notes):
    """{name: its captions} of what can be packed, equal pictures joined; adds to skipped, notes."""
    pairs, first = {}, {}
    for name in names:
        if name in skipped:
            continue
        captions = [text for text in found[name] if text and text.strip()]
        notes["captions have line breaks inside: written as one line"] += sum(
            bool(BREAKS.search(text.strip())) for text in captions)
        if not captions:
            skipped[name] = "empty caption"
            continue
        if name in digests:
            other = first.setdefault(digests[name], name)
            if other != name:
                skipped[name] = SAME
                name = other
        kept = pairs.setdefault(name, [])
        kept += [text for text in captions if text not in kept]
    return pairs


# ---------------------------------------------------------------------------- packing

def is_held_out(name, share):
    """Whether a picture belongs to the held-out share: a function of its name alone."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def samples_of(sources, pairs, config, skipped):
    """Yield write_shards' samples of (name, file or bytes); what is left out goes to skipped."""
    progress = Progress("packing", len(pairs), "pictures")
    prepare = partial(prepare_picture, short_side=config.short_side, quality=config.quality)
    for number, (name, kind, data) in enumerate(in_order(prepare, sources, config.workers)):
        progress.add()
        if kind is None:
            skipped[name] = data
            continue
        readable = re.sub(r"[^A-Za-z0-9-]+", "_", str(Path(name).with_suffix("")))[-60:]
        yield f"{number:07d}_{readable}", kind, data, pairs[name]


def read_sources(images, config):
    """What there is to pack: (names, found, digests, skipped, others, notes, sources).

    sources: a function of {name: captions} that yields (name, file or its bytes).
    """
    notes = Counter()
    table = images if images.suffix == ".parquet" else Path(config.captions)
    if table.is_file() and picture_column(table):
        found, digests = {}, {}
        for name, data, captions in parquet_pictures(table, config.columns):
            found[name], digests[name] = captions, hashlib.sha256(data).digest()

        def sources(pairs):
            for name, data, _ in parquet_pictures(table, config.columns):
                if name in pairs:
                    yield name, data

        return list(found), found, digests, {}, [], notes, sources
    names, passed = find_pictures(images)
    found, skipped, missing = find_captions(images, names, config, notes)
    digests = find_digests(images, names)

    def sources(pairs):
        for name in pairs:
            yield name, images / name

    return names, found, digests, skipped, passed + missing, notes, sources


def pack(images, target, config):
    """Pack as the settings say; returns the report that NAME.json gets."""
    name = config.name or images.resolve().name.removesuffix(".parquet")
    for folder in (target, target / "held_out"):
        if any(folder.glob(f"{glob.escape(name)}-[0-9]*.tar")):
            raise ValueError(f"{folder} has {name}-*.tar already: to add new pictures, pack a folder "
                             "of them alone under another --name; to pack all anew, remove these")
    names, found, digests, skipped, others, notes, sources = read_sources(images, config)
    pairs = choose_pairs(names, found, digests, skipped, notes)
    draft = target / f"{name}.unfinished"
    if draft.exists():  # of an interrupted run
        shutil.rmtree(draft)
    draft.mkdir(parents=True)
    report = {"pictures": len(names)}
    for part, place in (("pairs", draft), ("held_out", draft / "held_out")):
        chosen = {}
        for picture, captions in pairs.items():
            if is_held_out(picture, config.held_out) == (part == "held_out"):
                chosen[picture] = captions
        samples = samples_of(sources(chosen), chosen, config, skipped)
        report[part] = write_shards(place, samples, config.per_shard)
    for shard in sorted(draft.rglob("*.tar")):
        place = target / shard.relative_to(draft).parent
        place.mkdir(exist_ok=True)
        os.replace(shard, place / f"{name}-{shard.name}")
    shutil.rmtree(draft)
    report["skipped"] = dict(Counter(skipped.values()).most_common())
    report["no pictures"] = dict(Counter(reason.partition(";")[0] for _, reason in others))
    report["notes"] = {note: count for note, count in notes.items() if count}
    report["settings"] = dataclasses.asdict(config) | {"images": str(images)}
    (target / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    with open(target / f"{name}.skipped.tsv", "w", errors="surrogateescape") as file:
        for place, reason in sorted([*skipped.items(), *others]):
            file.write(f"{place}\t{reason}\n")
    if not report["pairs"] and not report["held_out"]:
        example = f", {others[0][0]}: {others[0][1]}" if others else ""
        raise ValueError(f"{images}: nothing could be packed{example}; {target}/{name}.skipped.tsv "
                         "has a reason for each file")
    return report


def main(argv=None):
    config, others = load_config(Config, globals(), argv)
    if len(others) != 2:
        raise ValueError("write: python -m data.prepare.own IMAGES TARGET --captions=...")
    report = pack(Path(others[0]), Path(others[1]), config)
    print(f"{others[1]}: of {report['pictures']:,} pictures {report['pairs']:,} are pairs, "
          f"{report['held_out']:,} held out, {sum(report['skipped'].values()):,} skipped")
    for kind in ("skipped", "no pictures", "notes"):
        for reason, count in report[kind].items():
            print(f"{count:>9,}  {reason}")


if __name__ == "__main__":
    run_main(main)
