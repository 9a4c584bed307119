"""HQ-CLIP: an image also tells its text from a wrong one, and names the text's tags.

    python pretrain.py configs/toy.py configs/ideas/hqclip.py

Loss: InfoNCE + local * CE(image: own text | own text, own negative)
      + tag * CE(the text's tags, equally likely | a linear head on the image)
(arXiv 2507.22431; formula from the abstract only: the form of both added losses is ours).
Negatives as in negclip.py. Tags are the meanings of the toy world's words for colour, shape,
size and texture; a text without any asks nothing of the head.
Left out: the model that looks at each image and writes four texts for it.
"""
import re

import numpy as np
import torch
import torch.nn.functional as F

from configs import original
from configs.ideas import negclip

out_dir = "out/hqclip"
local: float = 1.0   # weight of the choice between a text and its negative
tag: float = 0.5     # weight of the tags
_TAGS = sorted(set(negclip._MEANINGS.values()))  # (kind, name)


def extra_arrays(pairs, sample, caption, rng, config):
    arrays = negclip.extra_arrays(pairs, sample, caption, rng, config)
    words = re.findall(r"\w+", pairs.shards.captions(sample)[caption].lower())
    said = [negclip._MEANINGS.get(word) for word in words]
    arrays["tags"] = np.array([tag in said for tag in _TAGS], np.float32)
    return arrays


def prepare_model(clip, config):
    clip.extra.tags = torch.nn.Linear(clip.config.embed_dim, len(_TAGS))


def encode(clip, batch, config):
    rows = negclip.encode(clip, batch, config)
    log_shares = clip.extra.tags(rows["image"]).float().log_softmax(1)    # (b, tags)
    wanted = F.normalize(batch["tags"], p=1, dim=1)                       # sums to 1, or all 0
    rows["tags"] = -(wanted * log_shares).sum(1)                          # (b,)
    return rows


def global_loss(rows, config, ranks):
    better = (rows["image"] * (rows["text"] - rows["negative"])).sum(1)   # (b,), of two cosines
    choices = F.softplus(-rows["scale"] * better)  # the cross-entropy of two logits
    plain = original("global_loss")(rows, config, ranks)
    return plain + config.local * choices.mean() + config.tag * rows["tags"].mean()
