"""NIGHTS, the 20,019 judgements of DreamSim (arXiv 2306.09344): unpacks its zip and checks it.

    curl -C - -O https://data.csail.mit.edu/nights/nights.zip
    python -m data.prepare.nights data/nights --zip=nights.zip   # or the folder's nights.zip

data.csv is written last: a folder that has it is only checked, and a stopped run goes on where
it was. The zip is kept; with the pictures it needs about twice 58 GB.
"""
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

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
    """Write the files beside the zip's data.csv into `folder`, data.csv last; whole ones stay.

    zipfile itself keeps every member inside the folder and makes no links. Raises ValueError
    for an archive that is broken or holds no data.csv.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            tables = [name for name in file.namelist() if Path(name).name == "data.csv"]
            if not tables:
                raise ValueError(f"{archive}: holds no data.csv, so it is not NIGHTS")
            home = min(tables, key=len).removesuffix("data.csv")
            members = [member for member in file.infolist()
                       if member.filename.startswith(home) and not member.is_dir()]
            members.sort(key=lambda member: member.filename == f"{home}data.csv")
            progress = Progress(f"unpacking {archive}", len(members), "files")
            for member in members:
                path = folder / member.filename.removeprefix(home)
                if not path.exists() or path.stat().st_size != member.file_size:
                    member.filename = f"{member.filename.removeprefix(home)}.part"
                    part = Path(file.extract(member, folder))  # checks the CRC-32
                    os.replace(part, part.with_suffix(""))
                progress.add()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise ValueError(f"{archive}: broken ({error}); remove it and fetch it again") from None


def check(folder, counts):
    """Compare a folder with NIGHTS: every picture, and `counts` triplets of MIN_VOTES a split.

    Raises FileNotFoundError naming the first ten missing pictures; ValueError for other counts.
    """
    csv = csv_file(folder)
    named, found = set(), dict.fromkeys(counts, 0)
    for row in read_rows(csv):
        named.update((row["ref"], row["left"], row["right"]))
        if row["votes"] >= MIN_VOTES:
            found[row["split"]] += 1
    missing = sorted(name for name in named if not (csv.parent / name).is_file())
    if missing:
        raise FileNotFoundError(f"{folder}: {len(missing):,} of {len(named):,} pictures missing"
                                f", the first: {', '.join(missing[:10])}; remove data.csv and "
                                "start again: what is missing is unpacked")
    if found != counts:
        raise ValueError(f"{csv}: triplets with {MIN_VOTES} votes or more are {found}, NIGHTS "
                         f"has {counts}; another file, or a changed one")


def main(argv=None):
    config, others = load_config(Config, globals(), argv, files=1)
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
