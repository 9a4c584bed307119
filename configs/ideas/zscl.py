"""ZSCL: a trained CLIP learns a narrow domain and keeps its view of pictures in general.

    python pretrain.py configs/toy.py configs/ideas/zscl.py --init=out/toy/ckpt.pt

Loss: InfoNCE on the domain's pairs
      + keep * 4 * [CE(softmax(s I^ T^t / 2) | s I T^t / 2) + the same of the columns];
2 is the distillation's temperature, 4 its square. I are embeddings of references, random
pictures of the whole folder; T of random captions, not theirs. I^ and T come from the first
model (arXiv 2303.06628, formula as in the authors' code). keep=0 is plain fine-tuning.
--words: VR-LwF (arXiv 2207.09248, as in ZSCL's code), the domain's own pictures as references
and ten random tokens as each caption.
Left out: the mean of the weights along the way; the eleven tasks. A reference whose file is
broken has its pair counted as bad.
"""
import copy
import re

import torch
import torch.nn.functional as F

from configs import original
from data.images import normalise, train_image

out_dir = "out/zscl"
domain: str = "star"     # train on pairs with a caption that has this word; "": on all
keep: float = 1.0        # weight of the distillation
words: bool = False      # VR-LwF's references


def choose_pairs(shards, config):
    has_word = re.compile(rf"\b{config.domain}\b", re.IGNORECASE).search  # "" finds any caption
    chosen = [i for i in range(len(shards)) if any(map(has_word, shards.captions(i)))]
    if not chosen:
        raise ValueError(f"domain={config.domain}: no caption has this word")
    return chosen


def extra_arrays(pairs, sample, caption, rng, config):
    other, line = rng.integers(len(pairs.shards), size=2).tolist()
    image, ids = pairs.shards.image(other), pairs.shards.ids(line, 0)
    if config.words:
        image, ids = pairs.shards.image(sample), rng.integers(pairs.tokenizer.start, size=10)
    return {"reference": train_image(image, pairs.image_size, pairs.augmentation, rng),
            "line": pairs.padded(ids)}


def prepare_model(clip, config):
    if not config.init:
        raise ValueError("init=: this idea keeps what a trained CLIP knows; name one")
    clip.extra.first = copy.deepcopy(clip).requires_grad_(False)


def encode(clip, batch, config):
    rows, views = original("encode")(clip, batch, config), normalise(batch["reference"])
    with torch.no_grad():
        rows["was"] = clip.extra.first.encode_image(views)          # (b, E)
        rows["line"] = clip.extra.first.encode_text(batch["line"])  # (b, E)
    rows["now"] = clip.encode_image(views)                          # (b, E)
    return rows


def global_loss(rows, config, ranks):
    was, now, lines = ranks.gather(rows["was"], rows["now"], rows["line"])  # (B, E) each
    s = rows["scale"].detach() / 2
    lost = F.cross_entropy(s * rows["now"] @ lines.T, (s * rows["was"] @ lines.T).softmax(1))
    lost += F.cross_entropy(s * rows["line"] @ now.T, (s * rows["line"] @ was.T).softmax(1))
    return original("global_loss")(rows, config, ranks) + config.keep * 4 * lost
