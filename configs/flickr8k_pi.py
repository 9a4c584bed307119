"""Flickr8k after perceptual initialization: configs/flickr8k.py but for the vision tower.

    python perceptual_init.py configs/judgements.py && python pretrain.py configs/flickr8k_pi.py
"""
from configs.flickr8k import *

out_dir = "out/flickr8k_pi"
init_vision = "out/judgements/ckpt.pt"
