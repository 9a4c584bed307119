"""Your own images and captions -> shards that pretrain.py reads.

    python -m data.prepare.own IMAGES TARGET --captions=captions.csv   # columns file, caption
    python -m data.prepare.own IMAGES TARGET --captions=beside         # dog.txt for dog.png
    python -m data.prepare.own IMAGES TARGET --captions=names          # birds/owl_2.png
    python -m data.prepare.own FILE.parquet TARGET                     # which holds both

IMAGES is searched with its subfolders, links included. data/prepare/captions.py says what a
table may look like; its files are relative to IMAGES, and several rows of a file are several
captions, of which training draws one. "beside" takes the first line; with --lines=all each
line is a caption, with --lines=one the whole file is. "names" makes "owl, birds" of
birds/owl_2.png. Equal pictures become one pair with the captions of all.

Pictures whose short side exceeds --short_side are shrunk to it and stored as JPEG; smaller
JPEG, PNG and WebP files are stored as they are. --held_out=0.05 puts that share into
TARGET/held_out, chosen by a hash of the file's name: it stays out whatever you add.

TARGET gets NAME-00000.tar ... (NAME: --name, else the folder's own), so several packs can share
it. NAME.json counts pictures = pairs + held out + skipped by reason; NAME.skipped.tsv names
each skipped file. Nothing appears in TARGET before everything is done. Memory: the captions and
8 pictures a process.
"""
import glob
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from configs import load_config
from data.images import BadImage, load_rgb, open_image
from data.log import Progress, run_main
from data.prepare import captions as tables
from data.prepare.tars import in_order, write_shards

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that are stored as they are
BREAKS = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # what ends a line somewhere


@dataclass
class Config:
    captions: str = ""       # a table's file, "beside" or "names"
    columns: str = ""        # FILE,CAPTION: a table's columns, where they have unusual names
    lines: str = "first"     # of a text beside a picture: first, all (a caption each), or one
    name: str = ""           # first part of the shards' names; default: IMAGES' name
    held_out: float = 0.0    # share of the pairs, 0 to 1
    short_side: int = 256    # pixels, at most
    quality: int = 90        # of the JPEGs
    per_shard: int = 10_000  # pairs
    workers: int = os.cpu_count()  # processes

    def check(self):
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: must be at least 0 and below 1")
        if self.lines not in ("first", "all", "one"):
            raise ValueError(f"lines={self.lines}: must be first, all or one")


@dataclass
class Found:
    """What there is to pack, and what is to be said of it."""
    names: list                                   # of all pictures
    captions: dict = field(default_factory=dict)  # name -> [captions]
    digests: dict = field(default_factory=dict)   # name -> sha256, where another can be equal
    skipped: dict = field(default_factory=dict)   # name -> why it is not packed
    others: list = field(default_factory=list)    # (what is no picture, why)
    notes: Counter = field(default_factory=Counter)  # what to know -> how often


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
    """Append folder/place's pictures; above: the real paths of the folders on the way to it."""
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


def find_digests(images, names):
    """{name: sha256} of the files that can equal another: those whose size occurs again."""
    sizes = {}
    for name in names:
        if (images / name).is_file() and os.access(images / name, os.R_OK):
            sizes[name] = (images / name).stat().st_size
    often = Counter(sizes.values())
    digests = {}
    for name, size in sizes.items():
        if often[size] > 1:
            digests[name] = hashlib.sha256((images / name).read_bytes()).digest()
    return digests


# ---------------------------------------------------------------------------- captions

def find_in_folder(images, config):
    """The pictures of a folder and their captions -> Found."""
    names, passed = find_pictures(images)
    found = Found(names, others=passed, digests=find_digests(images, names))
    if config.captions == "beside":
        found.captions, found.skipped, found.notes = tables.captions_beside(
            images, names, config.lines)
    elif config.captions == "names":
        found.captions = {name: [tables.caption_of_names(name)] for name in names}
    elif Path(config.captions).is_file():
        table, found.notes = tables.read_captions(Path(config.captions), config.columns)
        found.captions, missing = tables.match_names(table, names, images)
        found.others += missing
        without = [name for name in names if name not in found.captions]
        found.skipped = dict.fromkeys(without, "not in the caption file")
    else:
        raise FileNotFoundError(f"--captions={config.captions}: no such file; name a table of "
                                "files and captions, or write beside or names")
    return found


def find_in_parquet(file, config):
    """The pictures of a parquet file and their captions -> Found."""
    found = Found([])
    for name, data, captions in tables.parquet_pictures(file, config.columns):
        found.names.append(name)
        found.captions[name] = captions
        found.digests[name] = hashlib.sha256(data).digest()
    return found


def choose_pairs(found):
    """{name: its captions} of what can be packed, equal pictures joined; adds to `found`."""
    pairs, first = {}, {}
    for name in found.names:
        if name in found.skipped:
            continue
        captions = [text for text in found.captions[name] if text and text.strip()]
        if not captions:
            found.skipped[name] = "empty caption"
            continue
        for text in captions:
            if BREAKS.search(text.strip()):
                found.notes["captions have line breaks inside: written as one line"] += 1
        original = name
        if name in found.digests:
            original = first.setdefault(found.digests[name], name)
        if original != name:
            found.skipped[name] = "same picture again, its captions went to the first"
        kept = pairs.setdefault(original, [])
        kept += [text for text in captions if text not in kept]
    return pairs


# ---------------------------------------------------------------------------- packing

def is_held_out(name, share):
    """Whether a picture belongs to the held-out share: a function of its name alone."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def sources(images, pairs, table, config):
    """Yield (name, file or its bytes) of the chosen pairs, in their order."""
    if table:
        for name, data, _ in tables.parquet_pictures(table, config.columns):
            if name in pairs:
                yield name, data
    else:
        for name in pairs:
            yield name, images / name


def samples_of(entries, pairs, config, skipped):
    """Yield write_shards' samples of (name, file or bytes); adds what is bad to skipped."""
    progress = Progress("packing", len(pairs), "pictures")
    prepare = partial(prepare_picture, short_side=config.short_side, quality=config.quality)
    for number, (name, kind, data) in enumerate(in_order(prepare, entries, config.workers)):
        progress.add()
        if kind is None:
            skipped[name] = data
            continue
        readable = re.sub(r"[^A-Za-z0-9-]+", "_", str(Path(name).with_suffix("")))[-60:]
        yield f"{number:07d}_{readable}", kind, data, pairs[name]


def find_table(images, config):
    """The parquet file that holds the pictures themselves, or None for a folder of pictures."""
    table = images if images.suffix == ".parquet" else Path(config.captions)
    if not table.is_file() or not tables.picture_column(table):
        return None
    if table != images:
        names = []
        _search(images, "", (), names, [])
        if names:
            raise ValueError(f"{table} holds pictures itself, {images} others: give {table} as "
                             "IMAGES, to pack it alone")
    return table


def pack(images, target, config):
    """Pack as the settings say; returns the report that NAME.json gets."""
    name = config.name or images.resolve().name.removesuffix(".parquet")
    if any(target.rglob(f"{glob.escape(name)}-[0-9]*.tar")):
        raise ValueError(f"{target} has {name}-*.tar already: to add new pictures, pack them "
                         "alone under another --name; to pack all anew, remove these")
    table = find_table(images, config)
    found = find_in_parquet(table, config) if table else find_in_folder(images, config)
    pairs = choose_pairs(found)
    draft = target / f"{name}.unfinished"
    shutil.rmtree(draft, ignore_errors=True)  # of an interrupted run
    draft.mkdir(parents=True)
    report = {"pictures": len(found.names)}
    for part, place in (("pairs", draft), ("held_out", draft / "held_out")):
        held = part == "held_out"
        chosen = {picture: captions for picture, captions in pairs.items()
                  if is_held_out(picture, config.held_out) == held}
        entries = sources(images, chosen, table, config)
        samples = samples_of(entries, chosen, config, found.skipped)
        report[part] = write_shards(place, samples, config.per_shard)
    for shard in sorted(draft.rglob("*.tar")):
        place = target / shard.relative_to(draft).parent
        place.mkdir(exist_ok=True)
        os.replace(shard, place / f"{name}-{shard.name}")
    shutil.rmtree(draft)
    write_report(target / name, report, found, config)
    if not report["pairs"] and not report["held_out"]:
        first = [*found.others, *found.skipped.items()][0]
        raise ValueError(f"{images}: nothing could be packed ({first[0]}: {first[1]}); "
                         f"{target}/{name}.skipped.tsv has a reason for each file")
    return report


def write_report(path, report, found, config):
    """Complete the report and write path.json and path.skipped.tsv."""
    report["skipped"] = dict(Counter(found.skipped.values()).most_common())
    kinds = [reason.partition(";")[0] for _, reason in found.others]
    report["no pictures"] = dict(Counter(kinds))
    report["notes"] = dict(found.notes)
    report["settings"] = asdict(config)
    path.with_name(f"{path.name}.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [f"{name}\t{reason}\n" for name, reason in [*found.skipped.items(), *found.others]]
    table = path.with_name(f"{path.name}.skipped.tsv")
    table.write_text("".join(sorted(lines)), errors="surrogateescape")


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
