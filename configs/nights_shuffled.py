"""Control: NIGHTS with its votes permuted among the training triplets, everything else as it is.

    python perceptual_init.py configs/nights_shuffled.py

The same images and steps without the judgement: what is left is the effect of any warm start.
"""
from configs.nights import *

out_dir = f"out/nights_shuffled_{model}"
shuffle_votes = True
