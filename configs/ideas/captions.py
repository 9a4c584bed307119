"""DreamLIP: several captions of a picture at once, and the patches that each is about.

    python -m data.prepare.toy --out=data/toy5 --captions=5
    python pretrain.py configs/toy.py configs/ideas/captions.py --data=data/toy5/pairs

Loss: mean of InfoNCE over `captions` captions of each image
      + grouping * CE(the caption among its image's captions | the patches that it groups).
To group, cosines of a caption with the patches are stretched to 0..1 in each picture, those
above 1 / patches are the patches' weights, and the weighted sum is a unit vector (arXiv
2403.17007, formula as in the authors' code). The first caption is the one that plain training
would take; images with fewer captions repeat theirs. Grouping asks for captions that differ in
what they name.
LaCLIP (arXiv 2305.20088), one of several rewrites each time, is plain training on such shards.
Left out: captions by a language model; grouping against the captions of other images.
"""
import numpy as np
import torch.nn.functional as F

from configs import original

out_dir = "out/captions"
captions: int = 3        # of each image
grouping: float = 0.0    # weight of the loss between an image's captions and its patches


def choose_pairs(shards, config):
    some = range(min(len(shards), 1000))
    if config.captions > 1 and max(shards.caption_count(i) for i in some) == 1:
        raise ValueError(f"captions={config.captions}: the first {len(some)} pairs have one")
    return original("choose_pairs")(shards, config)


def extra_arrays(pairs, sample, caption, rng, config):
    others = rng.permutation(pairs.shards.caption_count(sample))
    lines = np.resize([caption, *others[others != caption]], config.captions)
    return {"captions": np.stack([pairs.padded(pairs.shards.ids(sample, i)) for i in lines])}


def encode(clip, batch, config):
    texts = clip.encode_text(batch["captions"].flatten(0, 1))                # (b * K, E)
    texts = texts.unflatten(0, (-1, config.captions))                        # (b, K, E)
    rows = {"text": texts[:, 0], "texts": texts, "scale": clip.logit_scale.exp()}
    if not config.grouping:
        return rows | {"image": clip.encode_image(batch["views"])}
    tokens = F.normalize(clip.vision(batch["views"], every=True).float(), dim=-1)
    patches = tokens[:, 1:]                                                  # (b, P, E)
    near = texts @ patches.mT                                                # (b, K, P)
    low, high = near.amin(2, keepdim=True), near.amax(2, keepdim=True)
    near = (near - low) / (high - low + 1e-6)
    near = near * (near > 1 / patches.shape[1])
    grouped = F.normalize((near @ patches).float(), dim=-1)                  # (b, K, E)
    cosines = (grouped[:, :, None] * texts[:, None]).sum(3)                  # (b, K, K)
    log_shares = (rows["scale"] * cosines).log_softmax(2)
    rows["grouping"] = -log_shares.diagonal(dim1=1, dim2=2).mean(1)          # (b,)
    return rows | {"image": tokens[:, 0]}


def global_loss(rows, config, ranks):
    loss = config.grouping * rows["grouping"].mean() if config.grouping else 0.0
    for texts in rows["texts"].unbind(1):                                    # (b, E) each
        plain = original("global_loss")(rows | {"text": texts}, config, ranks)
        loss = loss + plain / config.captions
    return loss
