"""Control, stage 1: the pictures and steps of the judgements without the judgements.

    python perceptual_init.py configs/toy_nights.py configs/ideas/same_pictures.py
    python pretrain.py configs/toy.py --init_vision=out/same_pictures/ckpt.pt \\
        --out_dir=out/toy_same_pictures

Is it the judgements or the pictures that help? Two views of ref must be nearer to each
other than to left and to right: stage 1's hinge with a second view of ref in the place of
the chosen side, a mean over both sides. No vote is looked at. A triplet costs four
pictures, stage 1's three. The views are not cropped.
"""
import numpy as np
import torch
import torch.nn.functional as F

from configs import original
from data.images import Augmentation, augment_batch, draw_augmentation
from data.order import sample_rng
from evaluate import two_afc

out_dir = "out/same_pictures"
_AUGMENTATION = Augmentation(flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1.0)


def augment(images, samples, epoch, seed):
    draws = [draw_augmentation(_AUGMENTATION, sample_rng(seed, epoch, int(sample)))
             for sample in samples]
    draws = torch.from_numpy(np.stack(draws)).to(images.device)           # (4b,11)
    return augment_batch(images, draws, _AUGMENTATION)                    # (4b,3,S,S)


def batch_loss(tower, samples, images, labels, epoch, config):
    images = torch.cat([images, images[:, :1]], 1)             # (b,4,3,S,S): ref once more,
    samples = torch.cat([samples, samples[:, :1] + 2**40], 1)  # (b,4): with draws of its own
    pixels = augment(images.flatten(0, 1), samples.flatten(), epoch, config.seed)
    bfloat16 = config.dtype == "bfloat16"
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bfloat16):
        embeddings = tower(pixels)                                        # (4b,E)
    embeddings = F.normalize(embeddings.float(), dim=-1)
    ref, left, right, again = embeddings.unflatten(0, (-1, 4)).unbind(1)  # (b,E) each
    hinge, chosen = original("triplet_loss"), torch.ones_like(labels)
    loss = hinge(ref, left, again, chosen, config.margin)
    loss = (loss + hinge(ref, right, again, chosen, config.margin)) / 2
    return loss, two_afc(ref, left, right, labels).mean()
