"""The paper group's accumulation: groups of a batch that do not see each other's negatives.

    torchrun --nproc_per_node=8 pretrain.py configs/yfcc.py configs/ideas/alone.py --group=1024

Their code takes the loss of each micro-batch alone and adds the gradients (arXiv 2505.14204's
repository). Here `group` pairs of each rank, and those of the other ranks beside them, form one
contrastive batch; the loss is a mean over all pairs. group = batch_size / ranks: the plain loss.
"""
from configs import original

out_dir = "out/alone"
group: int = 1024   # pairs of a rank that see each other; the last group may be smaller


def global_loss(rows, config, ranks):
    b, loss = len(rows["image"]), 0.0
    for start in range(0, b, config.group):
        part = dict(rows)
        for name in ("image", "text"):
            part[name] = rows[name][start:start + config.group]
        loss = loss + original("global_loss")(part, config, ranks) * len(part["image"]) / b
    return loss
