"""Damaged inputs at the commands: how many end in one line, how many are read, how many break.

    python -m tests.bench.fuzz                 # 2,000 inputs, seed 0
    python -m tests.bench.fuzz --count=100

Each input is a sound file with something done to it: bytes changed, cut or put in, lines dropped,
doubled or swapped, separators exchanged. It goes through the command that meets it first: caption
tables and label tables through packing, shards through indexing and checking, judgements through
their reader and their conversions, weights and result files through their readers, settings through
the command line. "refused": a ValueError or OSError, which users see as one line. "read": no error,
and what was read adds up. Anything else is a break, and is printed with the seed that makes it.
"""
import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import model
import pretrain
from configs import load_config
from data import results, shards
from data.prepare import check, own, tars, triplets
from data.triplets import read_rows

TABLE = ('file,caption\na.png,"a dog, running"\nb.png,two cats\nc.png,"a ""red"" car"\n'
         "d.png,snow\n")
LINES = "a.png b.png c.png\nb.png c.png d.png\nc.png d.png a.png\nd.png a.png b.png\n"
JUDGEMENTS = "ref,left,right,label,split\na.png,b.png,c.png,1,train\nb.png,c.png,d.png,0,val\n"


def damage(content, rng):
    """Bytes with one to three things done to them."""
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(content) + 1)
        lines = content.split(b"\n")
        kind = rng.randrange(7)
        if kind == 0:
            content = content[:place]
        elif kind == 1:
            content = content[:place] + rng.randbytes(rng.randint(1, 4)) + content[place + 1:]
        elif kind == 2:
            content = content[:place] + rng.choice([b",", b"\t", b";", b'"', b"\n", b"\0", b"\xff",
                                                    "\u2028é".encode()]) + content[place:]
        elif kind == 3:
            lines.pop(rng.randrange(len(lines)))
            content = b"\n".join(lines)
        elif kind == 4:
            lines.insert(0, rng.choice(lines))
            content = b"\n".join(lines)
        elif kind == 5:
            content = content.replace(b",", rng.choice([b";", b"\t", b"|", b" "]))
        else:
            rng.shuffle(lines)
            content = b"\n".join(lines)
    return content


def pack(folder, path):
    report = own.pack(folder, folder / "packed", own_config(path))
    total = report["pairs"] + report["held_out"] + sum(report["skipped"].values())
    assert report["pictures"] == total, report


def own_config(path):
    config, _ = load_config(own.Config, vars(own), [f"--captions={path}", "--workers=1",
                                                    "--held_out=0.3"])
    return config


def index(folder, path):
    place = folder / "shards"
    place.mkdir()
    shutil.copyfile(path, place / "0.tar")
    count = shards.index_shards(place)
    pairs = shards.Shards(place)
    assert len(pairs) == count and all(pairs[i][1] for i in range(count))
    with contextlib.suppress(SystemExit):
        check.main([str(place)])


def settings(folder, path):
    words = path.read_bytes().decode(errors="replace").replace("\0", "").split()
    with contextlib.suppress(SystemExit):  # --help
        load_config(pretrain.Config, vars(pretrain), words, files=0)


KINDS = {  # name: (suffix of the file, what reads it)
    "caption table": (".csv", pack),
    "list of judgements": (".txt", lambda folder, path: triplets.main(
        ["list", str(path), str(folder / "out.csv")])),
    "judgements": (".csv", lambda folder, path: read_rows(path)),
    "shard": (".tar", index),
    "weights": (".pt", lambda folder, path: model.load_clip(path)),
    "result": (".json", lambda folder, path: results.read_result(path)),
    "settings": (".args", settings),
}


def sound_files(folder):
    """{kind: bytes of a sound file}; four small pictures lie in `folder`."""
    members = []
    for number, name in enumerate("abcd"):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        members += [(f"{name}.png", (folder / f"{name}.png").read_bytes()),
                    (f"{name}.txt", f"picture {name}\n".encode())]
    tars.write_tar(folder / "sound.tar", members)
    small = model.CLIPConfig(8, 16, 8, 16, 1, 1, 8, 600, 16, 1, 1)
    clip = model.CLIP(small)
    model.write_checkpoint(folder / "sound.pt", {
        "format": model.FORMAT, "kind": "clip", "model": vars(small), "weights": clip.state_dict(),
        "config": {}, "step": 1, "samples": 1, "vocabulary": None})
    results.write_result(folder / "sound", {"format": results.FORMAT, "tasks": {}}, {})
    arguments = "--lr=1e-3 --batch_size=16 --crop=(0.6,1.0) --model=toy --keep_at=(1,2) --resume"
    return {"caption table": TABLE.encode(), "list of judgements": LINES.encode(),
            "judgements": JUDGEMENTS.encode(), "shard": (folder / "sound.tar").read_bytes(),
            "weights": (folder / "sound.pt").read_bytes(),
            "result": (folder / "sound.json").read_bytes(), "settings": arguments.encode()}


def one(kind, content, seed, pictures):
    """Read one damaged input: "refused", "read", or the traceback of what broke."""
    suffix, read = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for picture in pictures:
            shutil.copyfile(picture, folder / picture.name)
        path = folder / f"input{suffix}"
        path.write_bytes(damage(content, random.Random(seed)))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                read(folder, path)
        except (ValueError, OSError) as error:
            return "refused" if "\n" not in str(error).strip() else f"several lines: {error}"
        except Exception:
            return traceback.format_exc()
    return "read"


def main():
    count = next((int(word[8:]) for word in sys.argv[1:] if word.startswith("--count=")), 2000)
    os.environ["XDG_CACHE_HOME"] = tempfile.gettempdir()
    torch.manual_seed(0)
    outcomes = {kind: Counter() for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        sound = sound_files(Path(folder))
        pictures = sorted(Path(folder).glob("*.png"))
        for seed in range(count):
            kind = list(KINDS)[seed % len(KINDS)]
            outcome = one(kind, sound[kind], seed, pictures)
            if outcome not in ("refused", "read"):
                print(f"{kind}, seed {seed}:\n{outcome}")
                outcome = "broke"
            outcomes[kind][outcome] += 1
    print("| input | refused in one line | read | broke |\n|---|---|---|---|")
    for kind, counts in outcomes.items():
        print(f"| {kind} | {counts['refused']} | {counts['read']} | {counts['broke']} |")


if __name__ == "__main__":
    main()
