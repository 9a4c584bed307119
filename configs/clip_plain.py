"""YFCC15M with CLIP's own augmentation: a random crop of 0.9 to 1 of the area, nothing else.

    torchrun --nproc_per_node=8 pretrain.py configs/clip_plain.py
"""
from configs.yfcc import *

out_dir = f"out/clip_plain_{model}"
crop = (0.9, 1.0)
flip = 0.0
jitter = (0.0, 0.0, 0.0, 0.0)
jitter_p = grey_p = blur_p = 0.0
