"""SigLIP: each of the B x B pairs is a question of its own, "do these two belong together?"

    python pretrain.py configs/toy.py configs/ideas/siglip.py

Loss: sum over pairs of -log sigmoid(y (s cos + b)), divided by the images; y = 1 for an image's
own text, else -1 (arXiv 2303.15343; formula as in open_clip's code). The bias b starts at -10, as
nearly all pairs do not belong together, and the scale s at 10.
Left out: the ring that passes texts from rank to rank; here one gather does it.
"""
import math

import torch
import torch.nn.functional as F

from configs import original

out_dir = "out/siglip"


def prepare_model(clip, config):
    clip.logit_scale.data.fill_(math.log(10))
    clip.extra.bias = torch.nn.Parameter(torch.tensor(-10.0))


def encode(clip, batch, config):
    rows = original("encode")(clip, batch, config)
    rows["bias"] = clip.extra.bias
    return rows


def global_loss(rows, config, ranks):
    all_texts, = ranks.gather(rows["text"])                               # (B, E)
    logits = rows["scale"] * rows["image"] @ all_texts.T + rows["bias"]   # (b, B)
    b = len(logits)
    own = torch.arange(b, device=logits.device)
    signs = torch.full_like(logits, -1)
    signs[own, ranks.rank * b + own] = 1
    return -F.logsigmoid(signs * logits).sum(1).mean()
