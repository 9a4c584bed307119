"""DeGLA: NegCLIP with two choices of each pair's own, held near a slow average of itself.

    python pretrain.py configs/toy.py configs/ideas/degla.py --init=out/toy/ckpt.pt

Loss: NegCLIP's + local * CE(image: own text | own text, own negative; scale s)
      + local * CE(text: the teacher's own text | the teacher's, own negative; scale 10)
      + hold * sum of (z - the teacher's z)^2 over image, text and negative
(arXiv 2504.16801, formula as in the authors' code). Their last term is 0.005 times the sum over
the batch; ours is a mean over pairs. The teacher is momentum.py's. It also runs without --init.
Left out: four negatives a text, written by a language model; here it is negclip.py's one.
"""
import torch
import torch.nn.functional as F

from configs.ideas import negclip
from configs.ideas.momentum import after_step, prepare_model  # noqa: F401
from configs.ideas.negclip import extra_arrays  # noqa: F401

out_dir = "out/degla"
momentum = 0.9996    # a setting of momentum.py
local: float = 0.1   # weight of each of the two choices
hold: float = 0.64   # weight of the distances to the teacher: 0.005 times 128 pairs


def encode(clip, batch, config):
    rows = negclip.encode(clip, batch, config)
    with torch.no_grad():
        teacher = negclip.encode(clip.extra.teacher, batch, config)
    rows["teacher_text"], rows["drift"] = teacher["text"], 0.0
    for name in ("image", "text", "negative"):
        rows["drift"] = rows["drift"] + (rows[name] - teacher[name]).square().sum(1)    # (b,)
    return rows


def global_loss(rows, config, ranks):
    away = rows["text"] - rows["negative"]
    image_choice = rows["scale"] * (rows["image"] * away).sum(1)                        # (b,)
    towards = rows["teacher_text"] - rows["negative"]
    text_choice = 10 * (rows["text"] * towards).sum(1)                                  # (b,)
    choices = F.softplus(-image_choice) + F.softplus(-text_choice)  # CE of two logits each
    plain = negclip.global_loss(rows, config, ranks)
    return plain + config.local * choices.mean() + config.hold * rows["drift"].mean()
