"""NIGHTS, the 20,019 judgements of DreamSim (arXiv 2306.09344): unpacks its zip and checks it.

    curl -C - -O https://data.csail.mit.edu/nights/nights.zip
    python -m data.prepare.nights data/nights --zip=nights.zip

Without --zip, the folder's own nights.zip is taken. data.csv is written last: a folder that
has it is only checked, and a stopped run goes on where it was. The zip is kept; with the
pictures it needs about twice 58 GB.
"""
import os
import shutil
import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from configs import load_config
from data.log import Progress, run_main
from data.triplets import csv_file, read_rows

URL = "https://data.csail.mit.edu/nights/nights.zip"  # as DreamSim's own download script has it
MIN_VOTES = 6
COUNTS = {"train": 13_900, "val": 1_720, "test": 1_824}  # triplets of MIN_VOTES or more


@dataclass
class Config:
    zip: str = ""  # the archive; default: nights.zip in the folder


def extract(archive, folder):
    """Write the files that lie beside the zip's data.csv into `folder`; whole ones are kept.

    Raises ValueError, before anything is written, for a member that is a link or could land
    outside `folder`; and for an archive that is broken or holds no data.csv, or a full disk.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = files_beside_csv(archive, file.infolist())
            progress = Progress(f"unpacking {archive}", len(members), "files")
            for name, member in members:
                extract_file(file, member, folder / name)
                progress.add()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise ValueError(f"{archive}: broken ({error}); remove it and fetch it again") from None
    except OSError as error:
        raise ValueError(f"{error}; the same command goes on from here") from None


def files_beside_csv(archive, members):
    """[(name relative to data.csv's folder, member)], data.csv last. Raises ValueError."""
    homes = []
    for member in members:
        path = PurePosixPath(member.filename)
        # a backslash or a drive letter is an ordinary character here, but not on every machine
        outside = path.is_absolute() or ".." in path.parts or set("\\:") & set(member.filename)
        if outside or stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"{archive}: member {member.filename!r} is a link or leaves the "
                             "folder; this is not the published archive, nothing was unpacked")
        if path.name == "data.csv":
            homes.append(path.parent)
    if not homes:
        raise ValueError(f"{archive}: holds no data.csv, so it is not NIGHTS")
    home = min(homes, key=lambda path: len(path.parts))
    inside = []
    for member in members:
        path = PurePosixPath(member.filename)
        if path.is_relative_to(home) and not member.is_dir():
            inside.append((str(path.relative_to(home)), member))
    return sorted(inside, key=lambda entry: entry[0] == "data.csv")


def extract_file(file, member, path):
    """Write one member of an open zip to `path`, whole or not at all, unless it is there."""
    if path.exists() and path.stat().st_size == member.file_size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with file.open(member) as source, open(part, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)  # reading to the end checks the CRC-32
    os.replace(part, path)


def check(folder, counts):
    """Compare a folder with NIGHTS: every picture, and `counts` triplets of MIN_VOTES a split.

    Raises FileNotFoundError with the number of missing pictures and the first ten names, and
    ValueError for other counts.
    """
    csv = csv_file(folder)
    rows = list(read_rows(csv))
    named = set()
    found = dict.fromkeys(counts, 0)
    for row in rows:
        named.update((row["ref"], row["left"], row["right"]))
        if row["votes"] >= MIN_VOTES:
            found[row["split"]] += 1
    missing = sorted(name for name in named if not (csv.parent / name).is_file())
    if missing:
        some = ", ".join(missing[:10])
        raise FileNotFoundError(f"{folder}: {len(missing):,} of {len(named):,} pictures "
                                f"missing, the first: {some}; remove data.csv and start again: "
                                "what is missing is unpacked")
    if found != counts:
        raise ValueError(f"{csv}: triplets with {MIN_VOTES} votes or more are {found}, NIGHTS "
                         f"has {counts}; another file, or a changed one")


def main(argv=None):
    config, others = load_config(Config, globals(), argv)
    if len(others) > 1:
        raise ValueError("write: python -m data.prepare.nights [FOLDER] [--zip=FILE]")
    folder = Path(others[0] if others else "data/nights")
    archive = Path(config.zip) if config.zip else folder / "nights.zip"
    if not (folder / "data.csv").exists():
        if not archive.is_file():
            raise FileNotFoundError(f"{archive}: no such file; `curl -C - -o {archive} {URL}` "
                                    "fetches it, and goes on where it was stopped")
        extract(archive, folder)
        print(f"{archive} is unpacked and may be deleted")
    check(folder, COUNTS)
    print(f"{folder} is complete: {COUNTS} triplets of {MIN_VOTES} votes or more")


if __name__ == "__main__":
    run_main(main)
