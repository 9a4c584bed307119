"""LiT: one tower is locked and the other learns to meet it. Or only projectors learn.

    python pretrain.py configs/toy.py configs/ideas/lit.py   # locks the tower of out/toy_nights
    ... --init_vision=                                       # locks a random one: the control
    ... --lock=text --init_vision= --init=out/toy/ckpt.pt
    ... --projectors --init_vision= --init=out/toy/ckpt.pt

The loss is the plain one. lock = "vision" is LiT (arXiv 2111.07991), here with the tower that
human judgements left, its projection too. lock = "text" is locked-text tuning (ViTamin, arXiv
2404.02132). projectors: both projections become W x + MLP(x), and nothing else learns (arXiv
2409.19425, their code). Such a checkpoint is no CLIP: looks during the run measure it
(--held_out, --benchmarks).
Left out: towers of other kinds, their choice by CKA, projectors on every token.
"""
from torch import nn

out_dir = "out/lit"
init_vision = "out/toy_nights/ckpt.pt"
lock: str = "vision"       # the tower that does not learn; or "text"
projectors: bool = False   # lock both, and learn what projects them


class _Projector(nn.Module):
    def __init__(self, linear):
        super().__init__()
        width, embed_dim = linear.in_features, linear.out_features
        self.linear = linear
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(),
                                 nn.Linear(width, embed_dim))

    def forward(self, x):
        return self.linear(x) + self.mlp(x)


def prepare_model(clip, config):
    towers = {"vision": clip.vision, "text": clip.text}
    if config.lock not in towers:
        raise ValueError(f"lock={config.lock}: must be vision or text")
    if not config.init and (config.projectors or config.lock == "text"):
        raise ValueError("init=: a locked text tower needs weights: --init_vision= --init=...")
    towers[config.lock].requires_grad_(False)
    if config.projectors:
        for tower in towers.values():
            tower.requires_grad_(False)
            tower.projection = _Projector(tower.projection.requires_grad_(True))
