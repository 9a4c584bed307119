"""Stage 1 on food and materials together, equal shares of each.

    python -m data.prepare.triplets mix data/real/mixed.csv \\
        data/real/judgements/food/triplets.csv data/real/judgements/materials/triplets.csv
    python perceptual_init.py configs/judgements.py
"""
from configs.food import *

data = "data/real/mixed.csv"
out_dir = "out/judgements"
