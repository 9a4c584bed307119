"""CLIP-Refine: a short training that closes the gap between the places of images and of texts.

    python pretrain.py configs/toy.py configs/ideas/refine.py      # starts from out/toy/ckpt.pt

Loss: pull (|I - z|^2 + |T - z|^2), where z is a random unit vector that both of a pair share,
plus the mean over both directions of KL(targets || softmax(s I T)), where targets are soft
softmax(logits of the start) + (1 - soft) onehot (arXiv 2504.12717, their code). The start is a
fixed copy. pull = soft = 0 is the plain loss; --init= refines random weights.
Left out: an epoch of COCO at lr = 1e-6. Their rows have any length, their z is N(0, 1), their
logits have no s; here all are of unit length, as everywhere in this project.
"""
import copy

import numpy as np
import torch
import torch.nn.functional as F

from configs import original
from model import SIZES

out_dir = "out/refine"
init = "out/toy/ckpt.pt"
max_steps = 300
lr = 1e-4
pull: float = 1.0   # weight of the way to the random vector
soft: float = 0.5   # share of the start's opinion in the targets


def extra_arrays(pairs, sample, caption, rng, config):
    z = rng.standard_normal(SIZES[config.model].embed_dim, np.float32)
    return {"z": z / np.linalg.norm(z)}


def prepare_model(clip, config):
    clip.extra.start = copy.deepcopy(clip).requires_grad_(False)


def encode(clip, batch, config):
    rows = original("encode")(clip, batch, config)
    with torch.no_grad():
        start = original("encode")(clip.extra.start, batch, config)
    way = (rows["image"] - batch["z"]) ** 2 + (rows["text"] - batch["z"]) ** 2
    return rows | {"way": way.sum(1), "start_image": start["image"],
                   "start_text": start["text"], "start_scale": start["scale"]}


def _divergence(logits, opinion, first_row, soft):
    targets = soft * opinion.softmax(1)                                   # (b, B)
    row = torch.arange(len(logits), device=logits.device)
    targets[row, first_row + row] += 1 - soft
    return F.kl_div(logits.log_softmax(1), targets, reduction="batchmean")


def global_loss(rows, config, ranks):
    loss, first_row = config.pull * rows["way"].mean(), ranks.rank * len(rows["way"])
    for one, other in (("image", "text"), ("text", "image")):
        all_other, all_start = ranks.gather(rows[other], rows[f"start_{other}"])   # (B, E)
        logits = rows["scale"] * rows[one] @ all_other.T                  # (b, B)
        opinion = rows["start_scale"] * rows[f"start_{one}"] @ all_start.T
        loss = loss + _divergence(logits, opinion, first_row, config.soft) / 2
    return loss
