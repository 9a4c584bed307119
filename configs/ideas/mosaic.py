"""CLIM: four images side by side as one; each quarter of its patches meets its own text.

    python pretrain.py configs/toy.py configs/ideas/mosaic.py
    python pretrain.py configs/toy.py configs/ideas/mosaic.py --prompter               # CLOC

Loss: InfoNCE(I, T) + weight InfoNCE(Q, T). Q is the mean of the patch embeddings in an image's
quarter of a 2 x 2 mosaic (arXiv 2312.11376, their code). With --prompter, four learned queries,
one a quarter, ask the patches by attention (CLOC, arXiv 2410.02746; formula from the abstract
only). weight = 0 is the plain loss. Neighbours in a batch share a mosaic.
Left out: mosaics of 3 x 3 and 4 x 4, detectors; CLOC's written regions and their boxes. Where
the patches of a side are odd in number (ViT-B-32), quarters share the middle ones.
"""
import torch
import torch.nn.functional as F
from torch import nn

from configs import original
from data.ranks import Ranks

out_dir = "out/mosaic"
weight: float = 1.0      # of the loss on quarters
prompter: bool = False   # learned queries in place of the mean


def prepare_model(clip, config):
    share = config.batch_size // Ranks().world
    for name, rows in (("micro_batch", config.micro_batch), ("batch_size / ranks", share)):
        if rows % 4:
            raise ValueError(f"{name}={rows}: mosaics need a multiple of 4")
    if config.prompter:
        width = clip.config.embed_dim
        clip.extra.queries = nn.Parameter(torch.randn(4, width))
        clip.extra.ask = nn.MultiheadAttention(width, 1, batch_first=True)


def _mosaics(views):
    """(b, 3, S, S) -> (b / 4, 3, S, S): of four the first is top left, the second top right."""
    small = F.interpolate(views, scale_factor=0.5, mode="bilinear", antialias=True)
    grid = small.unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)   # (b/4, 3, 2, S/2, 2, S/2)
    return grid.flatten(4, 5).flatten(2, 3)


def _quarters(tokens):
    """Patches of mosaics (b/4, N-1, E) -> their means over each quarter (b/4, 4, E)."""
    side = round(tokens.shape[1] ** 0.5)
    plane = tokens.mT.unflatten(2, (side, side))                          # (b/4, E, S/P, S/P)
    return F.adaptive_avg_pool2d(plane, 2).flatten(2).mT


def encode(clip, batch, config):
    tokens = clip.vision(_mosaics(batch["views"]), every=True)[:, 1:]     # (b/4, N - 1, E)
    if config.prompter:
        queries = clip.extra.queries.expand(len(tokens), -1, -1)          # (b/4, 4, E)
        quarters, _ = clip.extra.ask(queries, tokens, tokens, need_weights=False)
    else:
        quarters = _quarters(tokens)
    quarter = F.normalize(quarters.flatten(0, 1).float(), dim=1)          # (b, E)
    return original("encode")(clip, batch, config) | {"quarter": quarter}


def global_loss(rows, config, ranks):
    plain = original("global_loss")
    loss = plain(rows, config, ranks)
    return loss + config.weight * plain(rows | {"image": rows["quarter"]}, config, ranks)
