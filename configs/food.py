"""Stage 1 on what people think tastes alike: 47,505 triplets of 5,000 photographs of food.

    python perceptual_init.py configs/food.py          # minutes on 2 CPU cores
"""
from configs.real import *

data = "data/real/judgements/food/triplets.csv"
out_dir = "out/food"

batch_size = 128
max_steps = STAGE_1_STEPS
warmup_steps = 30
lr = 1e-3
log_every = 50
