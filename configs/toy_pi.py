"""The toy world after perceptual initialization: configs/toy.py but for the vision tower.

    python perceptual_init.py configs/toy_nights.py && python pretrain.py configs/toy_pi.py
"""
from configs.toy import *

out_dir = "out/toy_pi"
init_vision = "out/toy_nights/ckpt.pt"
