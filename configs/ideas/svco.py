"""S-VCO's symmetry for CLIP: a picture and its mirror image, a caption and one turned round.

    python pretrain.py configs/toy.py configs/ideas/svco.py

An analog, not the method: S-VCO (arXiv 2502.13928) trains a generative model by
log-probabilities against those without a picture. Loss here: InfoNCE + weight * the sum of
-log sigmoid(s * difference of cosines) over four choices: the picture and the mirror image
each prefer their caption, the caption and the turned one each prefer their picture. In a
turned caption left and right are exchanged, so it is true of the mirror image. Captions that
name no side are true of both and ask nothing.
Left out: the generative model and its reference, edited pictures. "right" is always a side.
"""
import re

import numpy as np
import torch
import torch.nn.functional as F

from configs import original

out_dir = "out/svco"
weight: float = 1.0   # of the four choices
_SIDES = {"left": "right", "right": "left"}


def _turned(caption):
    return re.sub(r"\b(left|right)\b", lambda side: _SIDES[side[0]], caption.lower())


def choose_pairs(shards, config):
    if config.flip:
        raise ValueError(f"flip={config.flip}: where captions name sides, it must be 0")
    for i in range(min(len(shards), 1000)):
        for caption in shards.captions(i):
            if _turned(caption) != caption.lower():
                return original("choose_pairs")(shards, config)
    raise ValueError("none of the first 1,000 pairs has a caption that names left or right")


def extra_arrays(pairs, sample, caption, rng, config):
    text = pairs.shards.captions(sample)[caption]
    ids, = pairs.tokenizer.encode([_turned(text)])
    return {"turned": pairs.padded(ids), "sided": np.float32(_turned(text) != text.lower())}


def encode(clip, batch, config):
    rows = original("encode")(clip, batch, config)
    mirror = clip.encode_image(batch["views"].flip(3))                          # (b, E)
    turned = clip.encode_text(batch["turned"])                                  # (b, E)
    better = [(rows["image"] * (rows["text"] - turned)).sum(1),                 # (b,) each
              (mirror * (turned - rows["text"])).sum(1),
              (rows["text"] * (rows["image"] - mirror)).sum(1),
              (turned * (mirror - rows["image"])).sum(1)]
    choices = -F.logsigmoid(rows["scale"] * torch.stack(better)).sum(0)         # (b,)
    rows["choices"] = batch["sided"] * choices
    return rows


def global_loss(rows, config, ranks):
    plain = original("global_loss")(rows, config, ranks)
    return plain + config.weight * rows["choices"].mean()
