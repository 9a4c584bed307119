"""Stage 1 on NIGHTS as the paper's group ran it: 576 steps for ViT-B/32.

    python -m data.prepare.nights data/nights && python perceptual_init.py configs/nights.py
    python perceptual_init.py configs/nights.py --model=ViT-H-14     # its own warm-up

Their batch is 128 triplets on each of 6 GPUs; a mean over triplets is the same on one.
"""
from configs import given

model = given("model", "ViT-B-32")
data = "data/nights"
out_dir = f"out/nights_{model}"

batch_size = 768
epochs = 32
lr = 5e-4
# Their 2500 for H/14 is longer than these 576 steps: the rate ends at 1.15e-4, still rising.
warmup_steps = 2500 if model == "ViT-H-14" else 150
# Triplets, of three images each, in memory at once: by estimate for 80 GB; 0: the whole batch.
micro_batch = {"ViT-B-16": 256, "ViT-L-14": 128, "ViT-H-14": 64}.get(model, 0)
