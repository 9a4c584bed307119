"""CLIP's vocabulary: its published merges -> a `.tiktoken` file (see data/text.py).

    python -m data.prepare.vocabulary                            # -> data/clip.tiktoken
    python -m data.prepare.vocabulary --merges=bpe_simple_vocab_16e6.txt.gz

The merges (1.4 MB) are taken from --merges, a file or an address; without it from an installed
open_clip (`pip install --no-deps open_clip_torch` is enough), and else from OpenAI's repository.
Wherever from, they must have the published sha256.
"""
import argparse
import base64
import gzip
import hashlib
import importlib.util
import tempfile
from pathlib import Path

from data.log import run_main

NAME = "bpe_simple_vocab_16e6.txt.gz"
URL = f"https://raw.githubusercontent.com/openai/CLIP/main/clip/{NAME}"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES = 48_894  # CLIP uses the first of those in the file: 2 * 256 bytes + merges + 2 = 49,408


def published_merges():
    """Path of the merges in an installed open_clip, or OpenAI's address."""
    package = importlib.util.find_spec("open_clip")  # found, not imported
    return str(Path(package.submodule_search_locations[0], NAME)) if package else URL


def read_merges(source):
    """The merges' file, of a path or an address, as text; checked against SHA256."""
    if source.startswith(("https://", "http://")):
        from data.prepare.download import download
        with tempfile.TemporaryDirectory() as folder:
            packed = download(source, Path(folder, NAME), sha256=SHA256).read_bytes()
    else:
        if not Path(source).is_file():
            raise FileNotFoundError(f"--merges={source}: no such file; {NAME} lies at {URL}")
        packed = Path(source).read_bytes()
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
        ends = word.endswith("</w>")
        token = bytes(byte_of[character] for character in word.removesuffix("</w>"))
        tokens.append(token + b"\0" * ends)
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n"
                   for rank, token in enumerate(tokens))


def main(argv=None):
    parser = argparse.ArgumentParser("python -m data.prepare.vocabulary", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default="data/clip.tiktoken", type=Path)
    parser.add_argument("--merges", help="file or address; default: an installed open_clip's, or "
                                         "OpenAI's repository")
    args = parser.parse_args(argv)
    source = args.merges or published_merges()
    text = tiktoken_text(read_merges(source))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(args.out.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(args.out)
    print(f"{args.out}: CLIP's {len(text.splitlines()) + 2:,} tokens, from {source}")


if __name__ == "__main__":
    run_main(main)
