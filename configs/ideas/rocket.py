"""CLIP with a strong side: changed images meet captions that lost words (Improved baselines).

    python pretrain.py configs/toy.py configs/ideas/rocket.py

Loss: InfoNCE(clean) + weight InfoNCE(strong), as the sum in "Improved baselines for
vision-language pre-training" (arXiv 2305.08675, the code of clip-rocket). The strong side has
two views of an image and its caption without a fifth of the tokens, heads and a scale of its
own, and smoothed targets. weight = 0 is the plain loss.
Left out: BatchNorm in the heads, more and smaller crops, the losses without negatives.
"""
import copy
import math

import torch
import torch.nn.functional as F

from configs import original
from configs.ideas import align, slip

out_dir = "out/rocket"
weight: float = 1.0    # of the loss on the strong side
dropped: float = 0.2   # share of a caption's tokens that the strong side loses
smoothing = 0.1        # of its targets


def extra_arrays(pairs, sample, caption, rng, config):
    arrays = slip.extra_arrays(pairs, sample, caption, rng, config)
    ids = pairs.shards.ids(sample, caption)
    arrays["thinned"] = pairs.padded(ids[rng.random(len(ids)) >= config.dropped])
    return arrays


def prepare_model(clip, config):
    slip.prepare_model(clip, config)
    clip.extra.text_head = copy.deepcopy(clip.extra.head)
    clip.extra.logit_scale = torch.nn.Parameter(clip.logit_scale.detach().clone())


def encode(clip, batch, config):
    rows = slip.encode(clip, batch, config)
    thinned = clip.extra.text_head(clip.text(batch["thinned"])).float()   # (b, E)
    return rows | {"thinned": F.normalize(thinned, dim=1),
                   "strong_scale": clip.extra.logit_scale.exp()}


def global_loss(rows, config, ranks):
    loss = original("global_loss")(rows, config, ranks)
    for image in rows["strong"].unbind(1):                                # (b, E) each
        strong = {"image": image, "text": rows["thinned"], "scale": rows["strong_scale"]}
        loss = loss + config.weight / 2 * align.global_loss(strong, config, ranks)
    return loss


def after_step(clip, step, total_steps, config):
    original("after_step")(clip, step, total_steps, config)
    clip.extra.logit_scale.data.clamp_(max=math.log(100))
