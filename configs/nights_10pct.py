"""Stage 1 on a tenth of NIGHTS' training triplets; --fraction=0.05 takes half of the same tenth.

    python perceptual_init.py configs/nights_10pct.py

As many steps as with the whole set, so that the amount of judgements is the only difference.
"""
from configs import given
from configs.nights import *

out_dir = f"out/nights_10pct_{model}"
fraction = given("fraction", 0.1)
batch_size = min(768, round(13_900 * fraction))  # at 5 % there are only 695 triplets
max_steps = 576
