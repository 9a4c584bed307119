"""PixPro beside InfoNCE: patches of two crops that show the same place get the same embedding.

    python pretrain.py configs/toy.py configs/ideas/pixpro.py

Loss: InfoNCE - weight (mean cos(y_i, t_k) + the same with the crops exchanged). The mean is
over patches i of one crop and k of the other whose centres are nearer than 0.7 diagonals of the
larger patch; y_i = sum_j max(cos(x_i, x_j), 0)^2 x_j. t comes from a moving average of the
tower (arXiv 2011.10043, their code). weight = 0 is the plain loss.
Left out: ResNet and FPN, heads with BatchNorm, the linear map in y, a momentum that grows to 1.
Both crops are squares of the training view: they share its colours and are not flipped.
"""
import copy

import numpy as np
import torch
import torch.nn.functional as F

from configs import original

out_dir = "out/pixpro"
weight: float = 1.0      # of the loss on patches
momentum: float = 0.99   # of the moving average


def extra_arrays(pairs, sample, caption, rng, config):
    side = rng.uniform(0.45, 1, (2, 1))            # of the view: 0.2 to 1 of its area
    corner = rng.random((2, 2)) * (1 - side)
    return {"crops": np.float32(np.hstack([corner, side]))}               # (2, 3): x, y, side


def prepare_model(clip, config):
    clip.extra.teacher = copy.deepcopy(clip.vision).requires_grad_(False)


def _centres(crops, n):  # (b, 3) -> x, y of n x n cells of each crop, row by row (b, n * n, 2)
    steps = (torch.arange(n, device=crops.device) + 0.5) / n
    inside = torch.cartesian_prod(steps, steps).flip(1)                   # (n * n, 2)
    return crops[:, None, :2] + crops[:, None, 2:] * inside


def _agreement(x, t, crops, others):  # (b, P, E) of two crops, as unit rows -> (b,)
    side = round(x.shape[1] ** 0.5)
    near = 0.7 * 2 ** 0.5 / side * torch.maximum(crops[:, 2:], others[:, 2:])        # (b, 1)
    same = torch.cdist(_centres(crops, side), _centres(others, side)) < near[:, None]
    y = F.normalize((x @ x.mT).clamp(min=0) ** 2 @ x, dim=2)              # same: (b, P, P)
    return (y @ t.mT * same).sum((1, 2)) / same.sum((1, 2)).clamp(min=1)


def encode(clip, batch, config):
    b, size = len(batch["views"]), config.image_size
    crops = batch["crops"].transpose(0, 1).flatten(0, 1)      # (2b, 3): all first, all second
    places = 2 * _centres(crops, size).unflatten(1, (size, size)) - 1     # from -1 to 1
    views = F.grid_sample(batch["views"].repeat(2, 1, 1, 1), places, padding_mode="border",
                          align_corners=False)                            # (2b, 3, S, S)
    x = F.normalize(clip.vision(views, every=True)[:, 1:].float(), dim=2)
    t = F.normalize(clip.extra.teacher(views, every=True)[:, 1:].float(), dim=2)
    agree = _agreement(x, t.roll(b, 0), crops, crops.roll(b, 0)).unflatten(0, (2, b)).sum(0)
    return original("encode")(clip, batch, config) | {"agree": agree}     # (b,)


def global_loss(rows, config, ranks):
    return original("global_loss")(rows, config, ranks) - config.weight * rows["agree"].mean()


def after_step(clip, step, total_steps, config):
    original("after_step")(clip, step, total_steps, config)
    for old, new in zip(clip.extra.teacher.parameters(), clip.vision.parameters()):
        old.data.lerp_(new.data, 1 - config.momentum)
