"""Stage 2 on Flickr8k: 7,099 photographs with five captions each; minutes on 2 CPU cores.

    python -m data.prepare.vocabulary && python pretrain.py configs/flickr8k.py
"""
from configs.real import *

data = "data/real/pairs"
held_out = "data/real/pairs/held_out"  # 991 pairs: a guess finds the right one in 0.1 %
vocabulary = "data/clip.tiktoken"
out_dir = "out/flickr8k"

context_length = 48  # ids; longer captions are cut
crop = (0.4, 1.0)
flip = 0.5

batch_size = 128
max_steps = PAIR_STEPS
warmup_steps = 100
lr = 1e-3
workers = 0
log_every = 55       # an epoch
save_every = 165
keep_at = [128 * step for step in (PAIR_STEPS // 4, PAIR_STEPS // 2)]
