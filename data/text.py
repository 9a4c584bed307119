"""Captions to token ids and back: byte pair encoding as CLIP does it, through tiktoken.

    tokenizer = Tokenizer("data/clip.tiktoken")     # or the text of such a file, as in checkpoints
    tokenizer(["a dog", "two cats"])                # (2, 77) int64: start, words, end, zeros

CLIP cuts a caption into words by a regular expression and marks the end of each word. The mark
is here the byte NUL, which cleaned text never holds: tiktoken is given "a\\0dog\\0" for "a dog",
and its own pattern of a word is "up to a NUL".

A line of a `.tiktoken` file is "base64(token) rank". Ranks 0 to 255 are the bytes, 256 to 511 the
same with NUL, which end a word; above are the merges. Then come the ids of start and end.

Ids equal those of OpenAI's and open_clip's tokenizers, except for what only ftfy repairs: mojibake
("cafÃ©" for "café") and terminal escapes stay as they are. And "<|endoftext|>" in a caption is
spelled like any other characters instead of ending it. Packages that clean less (transformers,
instant-clip-tokenizer) agree on the cleaned text.
"""
import base64
import hashlib
import html
import re
import unicodedata
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken; the standard re has no classes for letters and numbers
import tiktoken
import torch

# CLIP's words, of lower-case text
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[{letter}]+|[{number}]|[^\s{letter}{number}]+"
find_words = regex.compile(WORD.format(letter=r"\p{L}", number=r"\p{N}")).findall
find_ascii_words = re.compile(WORD.format(letter="a-z", number="0-9")).findall  # twice as fast
MAKERS = "python -m data.prepare.vocabulary makes CLIP's, data.prepare.toy the toy world's"


class Tokenizer:
    """Encodes captions with the vocabulary of a `.tiktoken` file, given as its path or its text.

    .text, .fingerprint (16 hex digits of the text's sha256), .size (ids, with start and end),
    .start, .end. ValueError or FileNotFoundError, in one line, for a file that is none.
    """

    def __init__(self, vocabulary):
        self.text, name = str(vocabulary), "vocabulary"
        if "\n" not in self.text:
            name, file = f"vocabulary {vocabulary}", Path(vocabulary)
            if not file.is_file():
                raise FileNotFoundError(f"{name}: no such file; {MAKERS}")
            self.text = file.read_text(encoding="utf-8", errors="replace")
        ranks = read_ranks(self.text, name)
        self.start = len(ranks)
        self.end = self.start + 1
        self.size = self.start + 2
        self.fingerprint = hashlib.sha256(self.text.encode()).hexdigest()[:16]
        self._bpe = tiktoken.Encoding(
            "captions", pat_str=r"[^\x00]*\x00", mergeable_ranks=ranks, special_tokens={})

    def __reduce__(self):
        return Tokenizer, (self.text,)  # so that worker processes can be given one

    def __call__(self, captions, context_length=77):
        """Caption or list of B -> (B, context_length) int64: start, ids, end, zeros.

        What is too long is cut; the end stays. None and "" give start, end.
        """
        if isinstance(captions, str):
            captions = [captions]
        table = np.zeros((len(captions), context_length), np.int64)
        for row, ids in zip(table, self.encode(captions)):
            ids = [self.start] + ids[:context_length - 2] + [self.end]
            row[:len(ids)] = ids
        return torch.from_numpy(table)

    def encode(self, captions):
        """List of captions -> list of lists of ids, without start and end, uncut."""
        return [self._encode(caption) for caption in captions]

    def _encode(self, caption):  # "A dog" -> words a, dog -> "a\0dog\0" -> ids
        text = clean(caption)
        words = find_ascii_words(text) if text.isascii() else find_words(text)
        if not words:
            return []
        return self._bpe.encode_ordinary("\0".join(words) + "\0")

    def decode(self, ids):
        """Ids -> their words with spaces between; start, and all from the end on, are left out."""
        ids = [int(i) for i in ids]
        if self.end in ids:
            ids = ids[:ids.index(self.end)]
        text = self._bpe.decode_bytes([i for i in ids if i != self.start])
        return text.replace(b"\0", b" ").decode("utf-8", "replace").strip()


def read_ranks(text, name):
    """{token: rank} of a `.tiktoken` file's text; ValueError, with `name`, if it is none."""
    lines = text.splitlines()
    ranks = {}
    try:
        for line in lines:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        raise ValueError(f"{name}: not lines of base64 and rank; {MAKERS}") from None
    needed = {bytes([byte]) + mark for byte in range(256) for mark in (b"", b"\0")}
    if sorted(ranks.values()) != list(range(len(lines))) or not needed <= ranks.keys():
        raise ValueError(f"{name}: needs ranks 0 to n - 1, and all bytes with NUL and without; "
                         f"{MAKERS}")
    return ranks


# What ftfy, as CLIP calls it, does to single characters: it drops these ...
CONTROLS = (range(9), range(11, 12), range(14, 32), range(127, 128), range(0x206A, 0x2070),
            range(0xFEFF, 0xFF00), range(0xFFF9, 0xFFFD))
# ... and takes these apart by NFKC: ligatures, and letters as wide as a Chinese one, or half.
COMPOSED = (range(0x132, 0x134), range(0x149, 0x14A), range(0x1C4, 0x1CD), range(0x1F1, 0x1F4),
            range(0xFB00, 0xFB07), range(0x3000, 0x3001), range(0xFF01, 0xFFF0))


def repairs():
    """{code: replacement, or None to drop it}, for str.translate."""
    table = str.maketrans("ʼ‘’‚‛“”„‟", "'''''" + '""""')
    for codes in CONTROLS:
        for code in codes:
            table[code] = None
    for codes in COMPOSED:
        for code in codes:
            table[code] = unicodedata.normalize("NFKC", chr(code))
    return table


REPAIRS = repairs()


def clean(caption):
    """A caption as CLIP cleans it, as far as the standard library goes; lower case.

    HTML entities twice; then, unless all is printable ASCII: curly quotes straight, ligatures and
    wide letters apart, control characters (NUL too) dropped, lone surrogates to U+FFFD, NFC.
    White space is left to the words' pattern. None is a caption without words.
    """
    text = caption or ""
    if "&" in text:
        text = html.unescape(html.unescape(text))
    if not (text.isascii() and text.isprintable()):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = unicodedata.normalize("NFC", text.translate(REPAIRS))
    return text.lower()
