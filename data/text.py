"""Captions to token ids and back: byte pair encoding as CLIP does it, through tiktoken.

    tokenizer = Tokenizer("data/clip.tiktoken")     # or the text of such a file (checkpoints)
    tokenizer(["a dog", "two cats"])                # (2, 77) int64: start, words, end, zeros

CLIP marks the end of each word with "</w>", and a word is what a regular expression finds.
tiktoken knows no such mark, so a vocabulary file here ends every word with the byte NUL, which
text never holds; each word found gets a NUL, and tiktoken's own pattern is "up to the NUL".
A line of the file is "base64(token) rank"; ranks 0-511 are the 256 bytes and the 256 bytes with
the mark, a higher rank is a merge. The start id is the number of ranks, the end id one more.
"""
import base64
import hashlib
import html
import unicodedata
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken; the standard re has no classes for letters and numbers
import tiktoken
import torch

# A word, after lower-casing: as in CLIP's tokenizer. The NUL, found alone, parts two captions.
WORD = (r"\x00|<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
        r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x00]+")
MAX_CHARACTERS = 10_000  # a caption is cut here; its first 75 tokens are long past


class Tokenizer:
    """Encodes captions with the vocabulary of a `.tiktoken` file, given as path or as its text."""

    def __init__(self, vocabulary):
        self.text = vocabulary if "\n" in str(vocabulary) else Path(vocabulary).read_text()
        ranks = {}
        for line in self.text.split("\n"):
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token)] = int(rank)
        self.fingerprint = hashlib.sha256(self.text.encode()).hexdigest()[:16]
        self.start, self.end, self.size = len(ranks), len(ranks) + 1, len(ranks) + 2
        self._bpe = tiktoken.Encoding("words", pat_str=r"[^\x00]*\x00", mergeable_ranks=ranks,
                                      special_tokens={})
        self._gap = ranks[b"\0"]  # the token of an empty word: no caption holds one
        self._word = regex.compile(WORD)

    def encode(self, captions):
        """List of captions -> list of lists of ids, without start and end."""
        ids, lengths = self._encode(captions)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]

    def __call__(self, captions, context_length=77):
        """Caption or list of them -> (B, context_length) int64: start, ids, end, zeros."""
        ids, lengths = self._encode([captions] if isinstance(captions, str) else captions)
        firsts = np.cumsum(lengths) - lengths
        table = np.zeros((len(lengths), context_length), np.int64)
        kept = np.minimum(lengths, context_length - 2)
        rows = np.repeat(np.arange(len(kept)), kept)
        columns = np.arange(len(rows)) - np.repeat(np.cumsum(kept) - kept, kept)
        table[:, 0] = self.start
        table[rows, 1 + columns] = ids[firsts[rows] + columns]
        table[np.arange(len(kept)), 1 + kept] = self.end
        return torch.from_numpy(table)

    def decode(self, ids):
        """Ids -> text: words parted by spaces; start, end and what follows the end are left out."""
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(self.end)] if self.end in ids else ids
        text = self._bpe.decode_bytes([i for i in ids if i != self.start])
        return text.replace(b"\0", b" ").decode("utf-8", "replace").strip()

    def _encode(self, captions):
        """-> ids of all captions one after another, and the number of each: numpy arrays."""
        if not len(captions):
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        words = self._word.findall(" \0 ".join(map(clean, captions)) + " \0")
        # "a dog" + gap -> "a NUL dog NUL NUL": two words and an empty one
        ids = self._bpe.encode_to_numpy("".join(
            [word + "\0" if word != "\0" else "\0" for word in words]))
        gaps = np.flatnonzero(ids == self._gap)
        return ids[ids != self._gap], np.diff(gaps, prepend=-1) - 1


def clean(text):
    """Text as CLIP cleans it, as far as the standard library goes; None is an empty caption."""
    text = (text or "")[:MAX_CHARACTERS].replace("\0", " ")
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if "&" in text:
        text = html.unescape(html.unescape(text))
    return text.lower()
