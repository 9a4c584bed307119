"""Control: the same judgements after pretraining; starts from Flickr8k's baseline.

    python pretrain.py configs/flickr8k.py && python perceptual_init.py configs/flickr8k_posthoc.py

As nights_posthoc.py (qkv only, Adam without decay), at a fiftieth of stage 1's rate.
"""
from configs.judgements import *

init = "out/flickr8k/ckpt.pt"
out_dir = "out/flickr8k_posthoc"
train = "qkv"
lr = 2e-5
weight_decay = 0.0
beta2 = 0.999
