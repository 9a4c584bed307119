"""SyCoCa: CoCa, and the caption helps to rebuild hidden patches of the picture.

    python pretrain.py configs/toy.py configs/ideas/sycoca.py

Loss: CoCa's + mean over pictures of sum over hidden patches of w * mean (pixel - rebuilt)^2
(arXiv 2401.02137; formula from the abstract only). The vision tower runs once more, on the
patches that are seen; a decoder layer reads them and the caption. A patch's pixels have
mean 0 and variance 1, as in MAE (arXiv 2111.06377). Theirs hides patches by their nearness
to the caption. Here the lot hides, and nearness is the weight w, softmax(focus * cosine):
a choice by trained numbers would turn rounding into another picture, and micro-batches
would no longer give the steps of the whole.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from configs.ideas import coca
from model import SIZES

out_dir = "out/sycoca"
rebuilding: float = 1.0   # weight of the patches' loss; 0: CoCa
hidden: float = 0.5       # share of the patches that is hidden
focus: float = 10.0       # how much more a patch near to the caption counts; 0: all alike


def extra_arrays(pairs, sample, caption, rng, config):
    side = config.image_size // SIZES[config.model].patch_size
    return {"noise": rng.random(side ** 2, np.float32)}


def prepare_model(clip, config):
    coca.prepare_model(clip, config)
    width, patches = clip.config.embed_dim, len(clip.vision.position_embedding) - 1
    clip.extra.rebuild = coca._decoder(width)
    clip.extra.places = nn.Parameter(0.02 * torch.randn(patches, width))
    clip.extra.pixels = nn.Linear(width, 3 * clip.config.patch_size ** 2)


def encode(clip, batch, config):
    patches, words = coca._tokens(clip, batch)
    rows = coca._rows(clip, batch, patches, words)
    order = batch["noise"].argsort(1)                                     # (b, N - 1)
    hide, keep = order.tensor_split([round(config.hidden * order.shape[1])], 1)
    seen = clip.vision(batch["views"], keep=keep, every=True)             # (b, N - K, E)
    ends = batch["tokens"].to(words.device).argmax(1)                     # (b,)
    padding = torch.arange(words.shape[1], device=words.device) > ends[:, None]
    padding = F.pad(padding, (seen.shape[1], 0))                          # (b, N - K + longest)
    rebuilt = clip.extra.rebuild(clip.extra.places[hide], torch.cat([seen, words], 1),
                                 memory_key_padding_mask=padding)         # (b, K, E)
    side = clip.config.patch_size
    due = F.unfold(batch["views"].float(), side, stride=side).mT          # (b, N - 1, 3PP)
    due = F.layer_norm(due.take_along_dim(hide[:, :, None], 1), due.shape[2:])
    errors = (clip.extra.pixels(rebuilt).float() - due).square().mean(2)  # (b, K)
    near = (F.normalize(patches[:, 1:].float(), dim=-1) * rows["text"][:, None]).sum(2)
    weights = (config.focus * near.detach().take_along_dim(hide, 1)).softmax(1)
    rows["rebuilding"] = (weights * errors).sum(1)                        # (b,)
    return rows


def global_loss(rows, config, ranks):
    return coca.global_loss(rows, config, ranks) + config.rebuilding * rows["rebuilding"].mean()
