"""NegCLIP: each caption brings a wrong one along, in which two words have traded places.

    python pretrain.py configs/toy.py configs/ideas/negclip.py

Loss: InfoNCE of images against texts and negatives (B x 2B) and of texts against images (B x
B), averaged (arXiv 2210.01936; formula from its README and the code of forks). A negative
swaps two words of one kind, "a red star and a blue ring" -> "a blue star and a red ring", if
that says something else; if not, one word gives way to another of its kind. The kinds are the
toy world's colours, shapes, sizes and textures. A caption without any of their words has two
others swapped, whatever that does to its grammar; one with a single word has the empty text as
its negative.
Left out: parts of speech by spaCy; similar images in one batch. A change behind context_length
is lost, and loss_chunk does not apply.
"""
import re
from itertools import combinations

import torch

from configs import original
from data.prepare.toy import WORDS

out_dir = "out/negclip"
_MEANINGS = {}  # word -> its kind and what it means
for _kind, _table in WORDS.items():
    for _words in _table:
        _MEANINGS |= dict.fromkeys(_words, (_kind, _words[0]))


# What is said of each object, in any order of the objects. An article begins one.
def _objects(words, meanings):
    phrases = [phrase.split() for phrase in re.split(r"\ban? ", " ".join(words))]
    return sorted([meanings[word] for word in phrase if word in meanings] for phrase in phrases)


def _negative(caption, rng):
    words = re.split(r"(\w+)", caption.lower())  # every second one; the rest stands between
    known = not _MEANINGS.keys().isdisjoint(words)
    meanings = _MEANINGS if known else {word: ("any", word) for word in words[1::2]}
    places = rng.permutation([i for i, word in enumerate(words) if word in meanings])
    changes = [{i: words[j], j: words[i]} for i, j in combinations(places, 2)]
    changes += [{i: word} for i in places for word in rng.permutation(list(meanings))]
    for change in changes:  # the first that keeps the grammar and not the meaning
        wrong = [change.get(i, word) for i, word in enumerate(words)]
        same_kinds = all(meanings[words[i]][0] == meanings[new][0] for i, new in change.items())
        if same_kinds and _objects(wrong, meanings) != _objects(words, meanings):
            text = re.sub(r"\ban (?=[^aeiou])", "a ", "".join(wrong))
            return re.sub(r"\ba (?=[aeiou])", "an ", text)
    return ""


def extra_arrays(pairs, sample, caption, rng, config):
    negative = _negative(pairs.shards.captions(sample)[caption], rng)
    return {"negative": pairs.padded(pairs.tokenizer.encode([negative])[0])}


def encode(clip, batch, config):
    rows = original("encode")(clip, batch, config)
    rows["negative"] = clip.encode_text(batch["negative"])  # (b, E)
    return rows


def global_loss(rows, config, ranks):
    images, texts, negatives = ranks.gather(rows["image"], rows["text"], rows["negative"])
    texts = torch.cat([texts, negatives])                   # (2B, E)
    first_row = ranks.rank * len(rows["image"])
    return original("contrastive_loss")(
        rows["image"], rows["text"], images, texts, rows["scale"], first_row)
