"""Captions to token ids and back: byte pair encoding as CLIP does it, through tiktoken.

    tokenizer = Tokenizer("data/clip.tiktoken")     # or the text of such a file, as in checkpoints
    tokenizer(["a dog", "two cats"])                # (2, 77) int64: start, words, end, zeros

CLIP cuts a caption into words by a regular expression and marks the end of each. tiktoken has no
such mark, so here it is the byte NUL, which text never holds: a `.tiktoken` file has it at the end
of the tokens that end a word, each word gets one, and tiktoken's own pattern is "up to a NUL".
A line of the file is "base64(token) rank". Ranks 0-511 are the 256 bytes, without mark and with;
those above are merges. The start id is the number of ranks, the end id one more.

Ids equal those of OpenAI's and open_clip's tokenizers, except for what only ftfy repairs: mojibake
("cafÃ©" for "café") and terminal escapes stay as they are. And "<|endoftext|>" in a caption is
spelled like any other characters instead of ending it. Packages that clean less (transformers,
instant-clip-tokenizer) agree on the cleaned text; on the raw one they differ where `clean` acts.
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

# CLIP's words, of lower-case text. A NUL of its own parts two captions; see Tokenizer._encode.
WORD = r"\x00|'s|'t|'re|'ve|'m|'ll|'d|[{letter}]+|[{number}]|[^\s{letter}{number}\x00]+"
find_words = regex.compile(WORD.format(letter=r"\p{L}", number=r"\p{N}")).findall
find_ascii_words = re.compile(WORD.format(letter="a-z", number="0-9")).findall  # twice as fast


class Tokenizer:
    """Encodes captions with the vocabulary of a `.tiktoken` file, given as its path or its text.

    .text, .fingerprint (16 hex digits of the text's sha256), .size (ids, with start and end),
    .start, .end. ValueError or FileNotFoundError, in one line, for a file that is none.
    """

    def __init__(self, vocabulary):
        self.text = str(vocabulary)
        if "\n" not in self.text:
            if not Path(vocabulary).is_file():
                raise FileNotFoundError(
                    f"vocabulary {vocabulary}: no such file; CLIP's is made by "
                    "`python -m data.prepare.vocabulary`, the toy world's by `python -m data.prepare.toy`")
            self.text = Path(vocabulary).read_text(encoding="utf-8")
        ranks = read_ranks(self.text, "vocabulary" if vocabulary == self.text else vocabulary)
        self.start, self.end, self.size = len(ranks), len(ranks) + 1, len(ranks) + 2
        self.fingerprint = hashlib.sha256(self.text.encode()).hexdigest()[:16]
        self._gap = ranks[b"\0"]  # the id of a word of no characters
        self._bpe = tiktoken.Encoding(
            "captions", pat_str=r"[^\x00]*\x00", mergeable_ranks=ranks, special_tokens={})

    def __reduce__(self):
        return Tokenizer, (self.text,)  # so that worker processes can be given one

    def __call__(self, captions, context_length=77):
        """Caption or list of B -> (B, context_length) int64: start, ids, end, zeros.

        What is too long is cut; the end stays. None and "" give start, end.
        """
        ids, lengths = self._encode([captions] if isinstance(captions, str) else captions)
        kept = np.minimum(lengths, context_length - 2)
        rows = np.repeat(np.arange(len(kept)), kept)
        places = np.arange(len(rows)) - np.repeat(kept.cumsum() - kept, kept)
        table = np.zeros((len(kept), context_length), np.int64)
        table[:, 0] = self.start
        table[rows, 1 + places] = ids[(lengths.cumsum() - lengths)[rows] + places]
        table[np.arange(len(kept)), 1 + kept] = self.end
        return torch.from_numpy(table)

    def encode(self, captions):
        """List of captions -> list of lists of ids, without start and end, uncut."""
        ids, lengths = self._encode(captions)
        ids, ends = ids.tolist(), lengths.cumsum().tolist()
        return [ids[first:last] for first, last in zip([0, *ends], ends)]

    def decode(self, ids):
        """Ids -> their words with spaces between; start, and all from the end on, are left out."""
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(self.end)] if self.end in ids else ids
        text = self._bpe.decode_bytes([i for i in ids if i != self.start])
        return text.replace(b"\0", b" ").decode("utf-8", "replace").strip()

    def _encode(self, captions):
        """List of B captions -> ids of all, one after another, and their numbers (B,): arrays.

        One pass for the whole list. ["a dog", "cat"] -> "a dog \\0 cat \\0" -> words a, dog, \\0,
        cat, \\0 -> "a\\0dog\\0\\0\\0cat\\0\\0\\0": behind each caption two empty words, whose id
        nothing else has.
        """
        text = "".join([clean(caption) + " \0 " for caption in captions])
        words = (find_ascii_words if text.isascii() else find_words)(text)
        ids = self._bpe.encode_to_numpy("\0".join([*words, ""]))
        gaps = ids == self._gap
        return ids[~gaps], np.diff(np.flatnonzero(gaps), prepend=-1)[::2] - 1


def read_ranks(text, name):
    """{token: rank} of a `.tiktoken` file's text; ValueError if there is no use for it here."""
    try:
        lines = [line.split() for line in text.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        raise ValueError(f"{name}: not a .tiktoken file (lines of base64 and rank)") from None
    bytes_needed = {bytes([byte]) + mark for byte in range(256) for mark in (b"", b"\0")}
    if sorted(ranks.values()) != list(range(len(lines))) or not bytes_needed <= ranks.keys():
        raise ValueError(f"{name}: ranks 0 to n - 1 and all bytes, without and with NUL, needed; "
                         "`python -m data.prepare.vocabulary` makes such a file")
    return ranks


def repairs():
    """What ftfy, as CLIP calls it, does to single characters: {code: replacement}."""
    quotes = dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'")
    quotes |= dict.fromkeys(range(0x201C, 0x2020), '"')
    controls = [*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF,
                *range(0xFFF9, 0xFFFD)]
    ligatures = [0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4),
                 *range(0xFB00, 0xFB07)]
    widths = [0x3000, *range(0xFF01, 0xFFF0)]  # characters as wide as a Chinese one, or half
    same = {code: unicodedata.normalize("NFKC", chr(code)) for code in ligatures + widths}
    return quotes | dict.fromkeys(controls) | same


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
