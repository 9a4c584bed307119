"""FLIP: the vision tower sees a random share of the patches, and a step costs that much less.

    python pretrain.py configs/toy.py configs/ideas/flip.py --share=0.5

The loss is the plain one (arXiv 2212.00794). Each image draws its patches anew in each epoch.
They stay in their order, so share = 1 is the plain tower to the bit. Evaluations see all.
Left out: the short training on whole images at the end. A longer run adds it:
--share=1 --max_steps=1100 --change=share,max_steps.
"""
import numpy as np
import torch.nn.functional as F

from model import SIZES

out_dir = "out/flip"
share: float = 0.5   # of the patches that is kept


def extra_arrays(pairs, sample, caption, rng, config):
    patches = (config.image_size // SIZES[config.model].patch_size) ** 2
    return {"noise": rng.random(patches, np.float32)}


def prepare_model(clip, config):
    if not 0 < config.share <= 1:
        raise ValueError(f"share={config.share}: of the patches to keep; above 0, at most 1")


def encode(clip, batch, config):
    patches = batch["noise"].shape[1]
    kept = max(1, round(config.share * patches))
    keep = batch["noise"].argsort(1)[:, :kept].sort(1).values             # (b, K)
    image = clip.vision(batch["views"], keep=keep).float()                # (b, E)
    return {"image": F.normalize(image, dim=1), "text": clip.encode_text(batch["tokens"]),
            "scale": clip.logit_scale.exp()}
