"""ALBEF's contrastive loss: a slow average of the model softens the targets.

    python pretrain.py configs/toy.py configs/ideas/momentum.py
    python pretrain.py configs/toy.py configs/ideas/momentum.py --teacher=out/other/ckpt.pt

Loss: InfoNCE with targets (1 - soft) * one-hot + soft * softmax(s I^ T^t), likewise from
texts; I^ and T^ are the teacher's rows (arXiv 2107.07651, formula as in the authors' code).
The teacher is a moving average of the weights. Theirs compares the student's rows with the
teacher's and a queue of older ones; here with the student's, so that soft=0 is the plain loss.
--teacher: a trained CLIP of any width and depth that stays as it is. That is near DCD (arXiv
2207.01426; abstract only), without its fused teacher and its weights for hard samples.
Left out: the queue, image-text matching, masked words.
"""
import copy

import torch
import torch.nn.functional as F

from configs import original
from model import load_clip

out_dir = "out/momentum"
momentum: float = 0.995   # share of the old average in the new one
soft: float = 0.4         # share of the teacher's opinion in the targets
teacher: str = ""         # checkpoint of a fixed teacher


def prepare_model(clip, config):
    clip.extra.teacher = load_clip(config.teacher) if config.teacher else copy.deepcopy(clip)
    clip.extra.teacher.requires_grad_(False)
    for name in ("image_size", "context_length", "vocab_size"):
        theirs, ours = getattr(clip.extra.teacher.config, name), getattr(clip.config, name)
        if theirs != ours:
            raise ValueError(f"teacher={config.teacher}: its {name} is {theirs}, ours {ours}")


def encode(clip, batch, config):
    rows = original("encode")(clip, batch, config)
    with torch.no_grad():
        teacher = original("encode")(clip.extra.teacher, batch, config)
    rows["teacher_image"], rows["teacher_text"] = teacher["image"], teacher["text"]   # (b, E)
    return rows


# Cross-entropy of the rows `one` with all `other`, where the targets are the teacher's opinion.
def _soft_loss(rows, one, other, ranks):
    everyone, of_teacher = ranks.gather(rows[other], rows[f"teacher_{other}"])        # (B, E)
    with torch.no_grad():
        opinion = (rows["scale"] * rows[f"teacher_{one}"] @ of_teacher.T).softmax(1)  # (b, B)
    return F.cross_entropy(rows["scale"] * rows[one] @ everyone.T, opinion)


def global_loss(rows, config, ranks):
    plain = original("global_loss")(rows, config, ranks)  # one-hot targets
    soft = _soft_loss(rows, "image", "text", ranks) + _soft_loss(rows, "text", "image", ranks)
    return (1 - config.soft) * plain + config.soft * soft / 2


def after_step(clip, step, total_steps, config):
    original("after_step")(clip, step, total_steps, config)
    if config.teacher:
        return
    weights = clip.state_dict()
    for name, average in clip.extra.teacher.state_dict().items():
        average.lerp_(weights[name], 1 - config.momentum)
