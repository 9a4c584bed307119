"""Stage 1 on which of two materials looks more like a third: 19,335 triplets of 100 pictures.

    python perceptual_init.py configs/materials.py
"""
from configs.food import *

data = "data/real/judgements/materials/triplets.csv"
out_dir = "out/materials"
