"""Stage 1 on THINGS' odd-one-out judgements: augmented, a hundredth of the rate.

    python -m data.prepare.triplets things trainset.txt IMAGES.txt data/things/triplets.csv
    python perceptual_init.py configs/things.py
"""
import numpy as np
import torch

from configs import given
from data.images import Augmentation, augment_batch, draw_augmentation
from data.order import sample_rng

model = given("model", "ViT-B-32")
data = "data/things/triplets.csv"
out_dir = f"out/things_{model}"

batch_size = 256 * 6
lr = 5e-6
micro_batch = {"ViT-B-32": 768, "ViT-B-16": 256, "ViT-L-14": 128, "ViT-H-14": 64}.get(model, 0)

# Which augmentation theirs was is not recorded: this is the paper's of stage 2 without its crop.
_AUGMENTATION = Augmentation(flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey_p=0.2,
                             blur_p=0.5)


def augment(images, samples, epoch, seed):
    """Each image's draws have their own generator: no micro-batch or resume changes them."""
    draws = [draw_augmentation(_AUGMENTATION, sample_rng(seed, epoch, int(sample)))
             for sample in samples]
    draws = torch.from_numpy(np.stack(draws)).to(images.device)              # (3b,11)
    return augment_batch(images, draws, _AUGMENTATION)                       # (3b,3,S,S)
