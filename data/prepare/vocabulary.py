"""CLIP's vocabulary: its published merges -> a `.tiktoken` file (see data/text.py).

    python -m data.prepare.vocabulary [TARGET]                   # default: data/clip.tiktoken
    python -m data.prepare.vocabulary --merges=bpe_simple_vocab_16e6.txt.gz

Without --merges, an installed open_clip's are read (`pip install --no-deps open_clip_torch` is
enough), else OpenAI's. Wherever from, they must have the published sha256.
"""
import base64
import gzip
import hashlib
import importlib.util
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from configs import load_config
from data.log import run_main, write_text

NAME = "bpe_simple_vocab_16e6.txt.gz"
URL = f"https://raw.githubusercontent.com/openai/CLIP/main/clip/{NAME}"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES = 48_894  # CLIP uses the first of those in the file: 2 * 256 bytes + merges + 2 = 49,408
# How published merges spell bytes, for str.translate of Latin-1 text: what is printable stands
# for itself, the others, in order, are U+0100 and on.
SPELLING = {}
for code in range(256):
    if code == 32 or not chr(code).isprintable():
        SPELLING[code] = chr(256 + len(SPELLING))


@dataclass
class Config:
    merges: str = ""  # a file; default: an installed open_clip's, else OpenAI's repository


def published_merges():
    """Path of the merges in an installed open_clip, or OpenAI's address."""
    package = importlib.util.find_spec("open_clip")  # found, not imported
    return str(Path(package.submodule_search_locations[0], NAME)) if package else URL


def read_merges(source):
    """The merges' file, of a path or an address, as text; ValueError unless it is CLIP's."""
    if source.startswith("https://"):
        try:
            packed = urllib.request.urlopen(source, timeout=60).read()
        except OSError as error:
            raise ValueError(f"{error}; get {source} otherwise, give --merges=FILE") from None
    else:
        packed = Path(source).read_bytes()
    if hashlib.sha256(packed).hexdigest() != SHA256:
        raise ValueError(f"{source}: is not CLIP's {NAME}, whose sha256 is {SHA256}")
    return gzip.decompress(packed).decode("utf-8")


def tiktoken_text(merges):
    """Text of the `.tiktoken` file: a token's rank is its id in CLIP.

    merges: lines of two tokens in SPELLING, where "</w>" marks the end of a word, ours a NUL.
    """
    byte_of = {ord(character): byte for byte, character in SPELLING.items()}
    printable_first = sorted(range(256), key=SPELLING.__contains__)  # so CLIP numbers bytes
    tokens = [bytes([byte]) for byte in printable_first]
    tokens += [token + b"\0" for token in tokens]
    for merge in merges.split("\n")[1:1 + MERGES]:  # the first line names a version
        word = merge.replace(" ", "")
        token = word.removesuffix("</w>").translate(byte_of).encode("latin-1")
        if word.endswith("</w>"):
            token += b"\0"
        tokens.append(token)
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n"
                   for rank, token in enumerate(tokens))


def main(argv=None):
    config, others = load_config(Config, globals(), argv, files=1)
    target = Path(others[0] if others else "data/clip.tiktoken")
    source = config.merges or published_merges()
    text = tiktoken_text(read_merges(source))
    if target.exists() and target.read_text(errors="replace") != text:
        raise ValueError(f"{target} is there and is not CLIP's vocabulary; name another target "
                         "(published merges are given with --merges=FILE)")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    print(f"{target}: CLIP's {text.count(chr(10)) + 2:,} tokens, from {source}")


if __name__ == "__main__":
    run_main(main)
