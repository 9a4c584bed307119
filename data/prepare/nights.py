"""Fetches NIGHTS, the 20,019 judgements of DreamSim (arXiv 2306.09344), or checks a folder of it.

    python -m data.prepare.nights                       # into data/nights
    python -m data.prepare.nights /big/disk/nights      # where it lies already: only the check

A new folder gets nights.zip, then its files, data.csv last: a stopped run goes on where it was. The
zip is deleted once everything is out. Together they need about twice the 58 GB of the pictures.
A folder that has data.csv is checked and not changed.
"""
import argparse
import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from data.log import Progress, run_main
from data.prepare.download import check_room, download
from data.triplets import csv_file, read_rows

URL = "https://data.csail.mit.edu/nights/nights.zip"  # as DreamSim's own download script has it
MIN_VOTES = 6
COUNTS = {"train": 13_900, "val": 1_720, "test": 1_824}  # triplets of MIN_VOTES or more


def extract(archive, folder):
    """Write the files beside the zip's data.csv into `folder`; files of the right size are kept.

    Raises ValueError, before anything is written, if any member could land outside `folder` or is
    a link; and for an archive that is broken or holds no data.csv.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            for member in members:
                _refuse_unsafe(archive, member)
            wanted = _beside_csv(archive, members)
            size = sum(member.file_size for _, member in wanted)
            folder.mkdir(parents=True, exist_ok=True)
            check_room(folder, size - sum((folder / name).stat().st_size for name, _ in wanted
                                          if (folder / name).exists()))
            line = Progress(f"unpacking {archive.name}", size / 1e6, "MB")
            for name, member in wanted:
                _extract_one(file, member, folder / name)
                line.add(member.file_size / 1e6)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise ValueError(f"{archive}: broken ({error}); remove it and start again") from None


def _refuse_unsafe(archive, member):
    """ValueError for a name that could land elsewhere, or a link that could point there."""
    path = PurePosixPath(member.filename)
    # a backslash or a drive letter is an ordinary character here, but not on every machine
    outside = path.is_absolute() or ".." in path.parts or set("\\:") & set(member.filename)
    if outside or stat.S_ISLNK(member.external_attr >> 16):
        raise ValueError(f"{archive}: member {member.filename!r} is a link or leaves the folder; "
                         "this is not the published archive, nothing was unpacked")


def _beside_csv(archive, members):
    """[(name relative to data.csv's folder, member)], data.csv at the end."""
    homes = [PurePosixPath(member.filename).parent for member in members
             if PurePosixPath(member.filename).name == "data.csv"]
    if not homes:
        raise ValueError(f"{archive}: holds no data.csv, so it is not NIGHTS")
    home = min(homes, key=lambda path: len(path.parts))
    inside = [(PurePosixPath(member.filename), member) for member in members]
    inside = [(path.relative_to(home), member) for path, member in inside
              if path.is_relative_to(home)]
    return sorted(inside, key=lambda entry: str(entry[0]) == "data.csv")


def _extract_one(file, member, target):
    if target.exists() and target.stat().st_size == member.file_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with file.open(member) as source, open(part, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)  # reading to the end checks the member's CRC-32
    os.replace(part, target)


def check(folder, counts):
    """Compare a folder with NIGHTS: every picture, and `counts` triplets of MIN_VOTES a split.

    Raises FileNotFoundError with the number of missing pictures of all that the csv names, and
    the first ten names; ValueError for other counts.
    """
    csv = csv_file(folder)
    rows = list(read_rows(csv))
    named = sorted({row[column] for row in rows for column in ("ref", "left", "right")})
    missing = [name for name in named if not (csv.parent / name).is_file()]
    if missing:
        some = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise FileNotFoundError(f"{folder}: {len(missing):,} of {len(named):,} pictures missing: "
                                f"{some}; remove data.csv and start again: the zip is fetched, "
                                "and what is missing is unpacked")
    found = dict.fromkeys(counts, 0)
    for row in rows:
        if row["votes"] >= MIN_VOTES:
            found[row["split"]] += 1
    if found != counts:
        raise ValueError(f"{csv}: triplets with {MIN_VOTES} votes or more are {found}, NIGHTS has "
                         f"{counts}; another file, or a changed one")


def main(argv=None):
    parser = argparse.ArgumentParser("python -m data.prepare.nights", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="data/nights", type=Path)
    parser.add_argument("--url", default=URL, help="where the zip is; default: its publishers")
    args = parser.parse_args(argv)
    if not (args.folder / "data.csv").exists():
        there = [path.name for path in args.folder.glob("*")]
        if there and not any(name.startswith("nights.zip") for name in there):  # mistyped?
            raise ValueError(f"{args.folder}: has files, but no data.csv; name NIGHTS' own folder, "
                             "or a new one to fetch it into")
        archive = download(args.url, args.folder / "nights.zip")
        extract(archive, args.folder)
        archive.unlink()
    check(args.folder, COUNTS)
    print(f"{args.folder} is complete: {COUNTS} triplets of {MIN_VOTES} votes or more")


if __name__ == "__main__":
    run_main(main)
