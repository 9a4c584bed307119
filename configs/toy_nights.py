"""Stage 1 on the toy world's simulated observers: about a minute on 2 CPU cores.

    python -m data.prepare.toy && python perceptual_init.py configs/toy_nights.py
"""
data = "data/toy/nights"
out_dir = "out/toy_nights"

model = "toy"
image_size = 32
batch_size = 128
max_steps = 300
warmup_steps = 30
lr = 1e-3
dtype = "float32"
compile = False
log_every = 20
