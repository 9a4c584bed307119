"""Control: the judgements come after pretraining, on the baseline's checkpoint.

    python perceptual_init.py configs/nights_posthoc.py    # out/yfcc_ViT-B-32/ckpt.pt -> whole CLIP

Adam at 1e-5 trains the attention inputs (qkv) of the vision blocks only. The stored code has batch
16; its accumulation default suggests 2048 (--batch_size=2048). --benchmarks=FOLDER puts zero-shot
before and after into the log.
"""
from configs import given

model = given("model", "ViT-B-32")
data = "data/nights"
init = f"out/yfcc_{model}/ckpt.pt"
out_dir = f"out/nights_posthoc_{model}"

train = "qkv"
batch_size = 16
epochs = 64
warmup_steps = 150
lr = 1e-5
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.999
log_every = 100
save_every = 1000
