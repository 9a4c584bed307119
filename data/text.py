"""Captions to token ids and back: byte pair encoding as CLIP does it, through tiktoken.

    tokenizer = Tokenizer("data/clip.tiktoken")     # or the text of such a file
    tokenizer(["a dog", "two cats"])                # (2, 77) int64: start, words, end, zeros

CLIP cuts a caption into words and marks the end of each. The mark is here the byte NUL, which
cleaned text never holds: tiktoken is given "a\\0dog\\0". A `.tiktoken` file is lines of "base64
rank": 256 bytes, the same with NUL, the merges. Then come the ids of start and end.
Ids equal those of OpenAI's and open_clip's tokenizers, but for what only ftfy repairs (cafÃ©),
and "<|endoftext|>" in a caption does not end it.
"""
import base64
import hashlib
import html
import re
import unicodedata
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken; the standard re has no classes for letters and numbers
import tiktoken

WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[{letter}]+|[{number}]|[^\s{letter}{number}]+"
find_words = regex.compile(WORD.format(letter=r"\p{L}", number=r"\p{N}")).findall
find_ascii_words = re.compile(WORD.format(letter="a-z", number="0-9")).findall  # twice as fast
MAKERS = "python -m data.prepare.vocabulary makes CLIP's, data.prepare.toy the toy world's"


class Tokenizer:
    """Encodes captions with the vocabulary of a `.tiktoken` file, given as its path or text.

    .text, .fingerprint (of the text), .size (number of ids, with start and end), .start, .end.
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
        return tokenizer_of, (self.text,)  # so that worker processes can be given one

    def __call__(self, captions, context_length=77):
        """Caption or list of B -> (B, context_length) int64: start, ids, cut to fit, end, 0."""
        import torch  # here, as processes that index do without
        if isinstance(captions, str):
            captions = [captions]
        table = np.zeros((len(captions), context_length), np.int64)
        for row, ids in zip(table, self.encode(captions)):
            ids = [self.start] + ids[:context_length - 2] + [self.end]
            row[:len(ids)] = ids
        return torch.from_numpy(table)

    def encode(self, captions):
        """List of captions -> list of lists of ids, without start and end, uncut."""
        found = []
        for text in map(clean, captions):
            words = find_ascii_words(text) if text.isascii() else find_words(text)
            marked = "\0".join([*words, ""])  # "a dog" -> "a\0dog\0"
            found.append(self._bpe.encode_ordinary(marked))
        return found

    def decode(self, ids):
        """Ids -> their words with spaces between, without start, and up to the first end."""
        ids = [int(i) for i in ids]
        if self.end in ids:
            ids = ids[:ids.index(self.end)]
        text = self._bpe.decode_bytes([i for i in ids if i != self.start])
        return text.replace(b"\0", b" ").decode("utf-8", "replace").strip()


@cache
def tokenizer_of(text):
    """A process builds a tokenizer that is sent to it once, however often it is sent."""
    return Tokenizer(text)


def read_ranks(text, name):
    """{token: rank} of a `.tiktoken` file's text; ValueError, with `name`, if it is none."""
    lines, ranks = text.splitlines(), {}
    try:
        for line in lines:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        pass  # fewer ranks than lines are refused below
    needed = {bytes([byte]) + mark for byte in range(256) for mark in (b"", b"\0")}
    if sorted(ranks.values()) != list(range(len(lines))) or not needed <= ranks.keys():
        raise ValueError(f"{name}: must be lines of base64 and rank, 0 to n - 1, with all "
                         f"bytes alone and with NUL; {MAKERS}")
    return ranks


# What ftfy, as CLIP calls it, does to single characters: quotes become straight, it drops these
CONTROLS = (range(9), range(11, 12), range(14, 32), range(127, 128), range(0x206A, 0x2070),
            range(0xFEFF, 0xFF00), range(0xFFF9, 0xFFFD))
# and takes these apart by NFKC: ligatures, and letters as wide as a Chinese one, or half.
COMPOSED = (range(0x132, 0x134), range(0x149, 0x14A), range(0x1C4, 0x1CD), range(0x1F1, 0x1F4),
            range(0xFB00, 0xFB07), range(0x3000, 0x3001), range(0xFF01, 0xFFF0))
REPAIRS = str.maketrans("ʼ‘’‚‛“”„‟", "'''''" + '""""') | dict.fromkeys(chain(*CONTROLS))
for code in chain(*COMPOSED):
    REPAIRS[code] = unicodedata.normalize("NFKC", chr(code))


def clean(caption):
    """A caption or None as CLIP cleans it, in lower case; white space is left to the words."""
    text = caption or ""
    if "&" in text:
        text = html.unescape(html.unescape(text))
    if not (text.isascii() and text.isprintable()):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = unicodedata.normalize("NFC", text.translate(REPAIRS))
    return text.lower()
