"""Control: the toy's judgements after pretraining; starts from the baseline and saves a whole CLIP.

    python pretrain.py configs/toy.py && python perceptual_init.py configs/toy_posthoc.py

As nights_posthoc.py (qkv only, Adam without decay), but at the rate of the toy's stage 1: at a
fiftieth of it, as for NIGHTS, so few steps would hardly move the tower.
"""
from configs.toy_nights import *

init = "out/toy/ckpt.pt"
out_dir = "out/toy_posthoc"
benchmarks = "data/toy/benchmarks"
train = "qkv"
weight_decay = 0.0
beta2 = 0.999
