"""SLIP: beside InfoNCE, two strongly changed views of an image find each other (SimCLR).

    python pretrain.py configs/toy.py configs/ideas/slip.py

Loss: InfoNCE + weight SimCLR. Each of the 2 B views looks for the other view of its image among
the 2 B - 1 others, by the cosines of a head's outputs over 0.1 (arXiv 2112.12750, their code;
SimCLR is arXiv 2002.05709). weight = 0 is the plain loss. An image is decoded three times.
rocket.py is the same idea with a text side.
Left out: BatchNorm in the head; it sees the embedding here, the tower's last layer there.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from configs import original
from data.images import Augmentation, augment_batch, draw_augmentation, train_image

out_dir = "out/slip"
weight: float = 1.0   # of the loss on strong views
STRONG = Augmentation((0.08, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8,
                      grey_p=0.2, blur_p=0.5)


def extra_arrays(pairs, sample, caption, rng, config):
    data = pairs.shards.image(sample)
    views = [train_image(data, pairs.image_size, STRONG, rng) for _ in range(2)]
    draws = [draw_augmentation(STRONG, rng) for _ in range(2)]
    return {"strong": np.stack(views), "strong_draws": np.stack(draws)}


def prepare_model(clip, config):
    width, wide = clip.config.embed_dim, 4 * clip.config.embed_dim
    clip.extra.head = nn.Sequential(nn.Linear(width, wide), nn.LayerNorm(wide), nn.GELU(),
                                    nn.Linear(wide, width))


def encode(clip, batch, config):
    images, draws = batch["strong"].flatten(0, 1), batch["strong_draws"].flatten(0, 1)
    views = augment_batch(images, draws, STRONG)                          # (2b, 3, S, S)
    strong = clip.extra.head(clip.vision(views)).float()
    strong = F.normalize(strong, dim=1).unflatten(0, (-1, 2))             # (b, 2, E)
    return original("encode")(clip, batch, config) | {"strong": strong}


def global_loss(rows, config, ranks):
    all_strong, = ranks.gather(rows["strong"])                            # (B, 2, E)
    row = torch.arange(len(rows["strong"]), device=all_strong.device)
    own, simclr = ranks.rank * len(row) + row, 0.0
    for this, other in ((0, 1), (1, 0)):
        views = rows["strong"][:, this]                                   # (b, E)
        alike = views @ all_strong[:, this].T / 0.1                       # (b, B)
        alike[row, own] = -math.inf  # a view does not look for itself
        wanted = views @ all_strong[:, other].T / 0.1                     # (b, B)
        simclr = simclr + F.cross_entropy(torch.cat([wanted, alike], 1), own) / 2
    return original("global_loss")(rows, config, ranks) + config.weight * simclr
