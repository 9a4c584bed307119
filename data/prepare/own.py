"""Your own images and captions -> shards that pretrain.py reads.

    python -m data.prepare.own IMAGES TARGET --captions=captions.csv   # columns file, caption
    python -m data.prepare.own IMAGES TARGET --captions=beside         # dog.txt for dog.png
    python -m data.prepare.own IMAGES TARGET --captions=names          # birds/owl_2.png
    python -m data.prepare.own FILE.parquet TARGET                     # which holds both

IMAGES is searched with its subfolders, links included; captions.py has the forms of tables.
Equal pictures become one pair. Smaller JPEG, PNG and WebP files are stored as they are. TARGET
gets NAME-00000.tar ... when all is done; NAME.json, where pictures = pairs + held out + skipped
by reason; and NAME.skipped.tsv, which names each skipped file.
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

from configs import check_ranges, load_config
from data.images import BadImage, load_rgb, open_image
from data.log import Progress, run_main
from data.prepare import captions as tables
from data.prepare.tars import in_order, write_shards

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that are stored as they are


@dataclass
class Config:
    captions: str = ""       # a table's file, "beside" or "names"
    lines: str = "first"     # of a text beside a picture: first, all (a caption each), or one
    name: str = ""           # first part of the shards' names; default: IMAGES' name
    held_out: float = 0.0    # share of the pairs; by name alone, so it stays as others come
    short_side: int = 256    # pixels, at most
    per_shard: int = 10_000  # pairs
    workers: int = os.cpu_count()  # processes

    def check(self):
        check_ranges(self, positive=("short_side", "per_shard"), lines=("first", "all", "one"))
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: is a share, from 0 to below 1")


@dataclass
class Found:
    """What there is to pack, and what is to be said of it."""
    names: list                                   # of all pictures
    captions: dict = field(default_factory=dict)  # name -> [captions]
    digests: dict = field(default_factory=dict)   # name -> sha256, where another can be equal
    skipped: dict = field(default_factory=dict)   # name -> why it is not packed
    others: list = field(default_factory=list)    # (what is no picture, why)
    notes: Counter = field(default_factory=Counter)  # what to know -> how often


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


def prepare_picture(entry, short_side):
    """(name, file or its bytes) -> (name, kind, bytes), or (name, None, the reason why not)."""
    name, source = entry
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        return name, *shrink(data, short_side)
    except BadImage as error:
        return name, None, str(error)
    except OSError:  # a dangling link, no permission
        return name, None, "unreadable file"


def find_pictures(folder):
    """Names of all picture files below `folder`, relative and with "/", sorted.

    Links to folders are followed. Also returns [(folder, why it was not entered)].
    """
    names, passed, errors = [], [], []
    for place, folders, files in os.walk(folder, followlinks=True, onerror=errors.append):
        inside = Path(place).relative_to(folder)
        above = [os.path.realpath(parent) for parent in Path(place).absolute().parents]
        if os.path.islink(place) and os.path.realpath(place) in above:
            passed.append((str(inside), "link to a folder that it lies in"))
            folders.clear()
            continue
        for file in files:
            if Path(file).suffix.lower() in SUFFIXES:
                names.append((inside / file).as_posix())
    passed += [(error.filename, "unreadable folder") for error in errors]
    if not names:
        raise FileNotFoundError(f"{folder}: no such folder, or no picture in it "
                                f"({', '.join(sorted(SUFFIXES))})")
    return sorted(names), passed


def find_digests(images, names):
    """{name: sha256} of the files that can equal another: those whose size occurs again."""
    readable = [name for name in names if os.access(images / name, os.R_OK)]
    sizes = Counter(os.path.getsize(images / name) for name in readable)
    digests = {}
    for name in readable:
        if sizes[os.path.getsize(images / name)] > 1:
            digests[name] = hashlib.sha256((images / name).read_bytes()).digest()
    return digests


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
        table = {}
        for name, texts in tables.read_texts(Path(config.captions)):
            table.setdefault(name, []).extend(texts)
            if not any(text and text.strip() for text in texts):
                found.notes["rows without a caption"] += 1
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
    for name, data, captions in tables.parquet_pictures(file):
        found.names.append(name)
        found.captions[name] = captions
        if data:  # no picture is no copy of another
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
        breaks = [text for text in captions if len(text.strip().splitlines()) > 1]
        if breaks:
            found.notes["captions have line breaks inside: written as one line"] += len(breaks)
        original = first.setdefault(found.digests.get(name, name), name)
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


def samples_of(images, pairs, config, skipped):
    """Yield write_shards' samples of the chosen pairs; adds what is bad to skipped."""
    if images.is_file():
        rows = tables.parquet_pictures(images)
        entries = ((name, data) for name, data, _ in rows if name in pairs)
    else:
        entries = ((name, images / name) for name in pairs)
    progress = Progress("packing", len(pairs), "pictures")
    prepare = partial(prepare_picture, short_side=config.short_side)
    for number, (name, kind, data) in enumerate(in_order(prepare, entries, config.workers)):
        progress.add()
        if kind is None:
            skipped[name] = data
            continue
        readable = re.sub(r"[^A-Za-z0-9-]+", "_", str(Path(name).with_suffix("")))[-60:]
        yield f"{number:07d}_{readable}", kind, data, pairs[name]


def pack(images, target, config):
    """Pack as the settings say; returns the report that NAME.json gets."""
    name = config.name or images.resolve().name.removesuffix(".parquet")
    if any(target.rglob(f"{glob.escape(name)}-[0-9]*.tar")):
        raise ValueError(f"{target} has {name}-*.tar already: to add new pictures, pack them "
                         "alone under another --name; to pack all anew, remove these")
    find = find_in_parquet if images.is_file() else find_in_folder
    found = find(images, config)
    pairs = choose_pairs(found)
    draft = target / f"{name}.unfinished"
    shutil.rmtree(draft, ignore_errors=True)  # of an interrupted run
    draft.mkdir(parents=True)
    report = {"pictures": len(found.names)}
    for part, place in (("pairs", "."), ("held_out", "held_out")):
        chosen = {picture: captions for picture, captions in pairs.items()
                  if is_held_out(picture, config.held_out) == (part == "held_out")}
        samples = samples_of(images, chosen, config, found.skipped)
        report[part] = write_shards(draft / place, samples, config.per_shard)
    for shard in sorted(draft.rglob("*.tar")):
        place = target / shard.relative_to(draft).parent
        place.mkdir(exist_ok=True)
        os.replace(shard, place / f"{name}-{shard.name}")
    shutil.rmtree(draft)
    write_report(target / name, report, found, config)
    if not report["pairs"] and not report["held_out"]:
        raise ValueError(f"{images}: nothing could be packed; {target / name}.skipped.tsv says "
                         "why, file by file")
    return report


def write_report(path, report, found, config):
    """Complete the report and write path.json and path.skipped.tsv."""
    report["skipped"] = Counter(found.skipped.values())
    report["no pictures"] = Counter(reason.partition(";")[0] for _, reason in found.others)
    report["notes"] = found.notes
    report["settings"] = asdict(config)
    Path(f"{path}.json").write_text(json.dumps(report, indent=2) + "\n")
    reasons = [*found.skipped.items(), *found.others]
    lines = sorted(f"{name}\t{reason}\n" for name, reason in reasons)
    Path(f"{path}.skipped.tsv").write_text("".join(lines), errors="surrogateescape")


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
