"""Stage 2 on YFCC15M as the paper's group ran it: the baseline, from a random vision tower.

    torchrun --nproc_per_node=8 pretrain.py configs/yfcc.py                      # ViT-B-32
    torchrun --nproc_per_node=8 pretrain.py configs/yfcc.py --model=ViT-L-14     # its own values

Their batch is 6,144 pairs a GPU (1024 x 6 accumulated) on the 3 GPUs of their plan. Here all
18,432 see each other, on any number of GPUs that divides them; configs/ideas/alone.py is their
arithmetic.
"""
from configs import given

model = given("model", "ViT-B-32")
data = "data/yfcc15m"
vocabulary = "data/clip.tiktoken"
out_dir = f"out/yfcc_{model}"

batch_size = 6144 * 3
epochs = {"ViT-B-16": 64, "ViT-H-14": 64}.get(model, 32)
lr = 2e-4 if model == "ViT-H-14" else 5e-4
warmup_steps = 10_000 if model == "ViT-L-14" else 2500
# Pairs in memory at once on a GPU of 80 GB, by estimate: measured are 2,304 of ViT-B-32, 55 GiB,
# and 512 of ViT-B-16, 38. The result does not depend on it.
micro_batch = {"ViT-B-16": 576, "ViT-L-14": 768, "ViT-H-14": 384}.get(model, 0)
recompute = model in ("ViT-L-14", "ViT-H-14")

# The paper's augmentation. Plain CLIP's is configs/clip_plain.py.
crop = (0.2, 1.0)
flip = 0.5
jitter = (0.4, 0.4, 0.4, 0.1)
jitter_p = 0.8
grey_p = 0.2
blur_p = 0.5

keep_at = [15_061_515 * epoch for epoch in (1, 2, 4, 8, 16, 32)]  # the scaling curve
save_every = 400
