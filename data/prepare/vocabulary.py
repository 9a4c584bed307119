"""CLIP's vocabulary: its published merges -> a `.tiktoken` file (see data/text.py).

    python -m data.prepare.vocabulary [TARGET]                   # default: data/clip.tiktoken
    python -m data.prepare.vocabulary --merges=bpe_simple_vocab_16e6.txt.gz

The merges (1.4 MB) are read from --merges; without it from an installed open_clip
(`pip install --no-deps open_clip_torch` is enough), and else from OpenAI's repository. Wherever
from, they must have the published sha256.
"""
import base64
import gzip
import hashlib
import importlib.util
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from configs import load_config
from data.log import run_main

NAME = "bpe_simple_vocab_16e6.txt.gz"
URL = f"https://raw.githubusercontent.com/openai/CLIP/main/clip/{NAME}"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES = 48_894  # CLIP uses the first of those in the file: 2 * 256 bytes + merges + 2 = 49,408


@dataclass
class Config:
    merges: str = ""  # a file; default: an installed open_clip's, else OpenAI's repository


def published_merges():
    """Path of the merges in an installed open_clip, or OpenAI's address."""
    package = importlib.util.find_spec("open_clip")  # found, not imported
    return str(Path(package.submodule_search_locations[0], NAME)) if package else URL


def read_merges(source):
    """The merges' file, of a path or an address, as text; checked against SHA256."""
    if source.startswith("https://"):
        try:
            with urllib.request.urlopen(source, timeout=60) as reply:
                packed = reply.read()
        except OSError as error:
            raise ValueError(f"{source}: {error}; fetch it by other means and name it with "
                             "--merges=FILE") from None
    elif Path(source).is_file():
        packed = Path(source).read_bytes()
    else:
        raise FileNotFoundError(f"--merges={source}: no such file; {NAME} lies at {URL}")
    found = hashlib.sha256(packed).hexdigest()
    if found != SHA256:
        raise ValueError(f"{source}: sha256 is {found}, CLIP's merges have {SHA256}")
    return gzip.decompress(packed).decode("utf-8")


def tiktoken_text(merges):
    """Text of the `.tiktoken` file: a token's rank is its id in CLIP.

    merges: lines of two tokens, spelled in printable characters, one for each byte (GPT-2's
    table): the printable ones of Latin-1 stand for themselves, the other bytes, in order, for
    U+0100 and on. "</w>" marks the end of a word, which is a NUL in our file.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    tokens = [bytes([byte]) for byte in byte_of.values()]  # CLIP numbers bytes in this order
    tokens += [token + b"\0" for token in tokens]
    for merge in merges.split("\n")[1:1 + MERGES]:  # the first line names a version
        word = merge.replace(" ", "")
        token = bytes(byte_of[character] for character in word.removesuffix("</w>"))
        if word.endswith("</w>"):
            token += b"\0"
        tokens.append(token)
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n"
                   for rank, token in enumerate(tokens))


def write_vocabulary(text, target):
    """Write `text`, whole or not at all; a file that holds anything else is not overwritten."""
    if target.exists() and target.read_bytes() != text.encode():
        raise ValueError(f"{target} is there and is not CLIP's vocabulary; move it away, or "
                         "name another target (published merges are given with --merges=FILE)")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, target)


def main(argv=None):
    config, others = load_config(Config, globals(), argv)
    if len(others) > 1:
        raise ValueError("write: python -m data.prepare.vocabulary [TARGET] [--merges=FILE]")
    target = Path(others[0] if others else "data/clip.tiktoken")
    source = config.merges or published_merges()
    text = tiktoken_text(read_merges(source))
    write_vocabulary(text, target)
    print(f"{target}: CLIP's {text.count(chr(10)) + 2:,} tokens, from {source}")


if __name__ == "__main__":
    run_main(main)
