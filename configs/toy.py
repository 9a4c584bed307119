"""The toy world's baseline: a small CLIP from random weights, about two minutes on 2 CPU cores.

    python -m data.prepare.toy && python pretrain.py configs/toy.py
"""
data = "data/toy/pairs"
held_out = "data/toy/pairs/held_out"
vocabulary = "data/toy/vocabulary/toy.tiktoken"
out_dir = "out/toy"

model = "toy"
image_size = 32
context_length = 32
crop = (0.9, 1.0)   # plain CLIP's; no flip, no jitter: captions name sides and colours

batch_size = 128
max_steps = 1000
warmup_steps = 100
lr = 2e-3
dtype = "float32"
compile = False
workers = 1         # the other core trains
log_every = 20
save_every = 250
keep_at = [128 * step for step in (60, 125, 250, 500)]
