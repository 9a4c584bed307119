"""Stage 2 on YFCC15M after perceptual initialization: configs/yfcc.py but for the vision tower.

    python perceptual_init.py configs/nights.py && \
    torchrun --nproc_per_node=8 pretrain.py configs/yfcc_pi.py
"""
from configs.yfcc import *

out_dir = f"out/yfcc_pi_{model}"
init_vision = f"out/nights_{model}/ckpt.pt"
