"""Control: the attention of the vision tower starts from a closed form, without any data.

    python pretrain.py configs/toy.py configs/ideas/mimetic_init.py

Trained transformers have W_Q W_K^T near a multiple of the identity in each head, and W_V
W_proj near a negative one. Mimetic initialization (arXiv 2305.09828) draws such products
and splits them:
    each head:  W_Q W_K^T ~ 0.7 Z + 0.7 I      all heads:  W_V W_proj = 0.4 Z - 0.4 I
with Z normal of variance 1 / D. The SVD U S V^T of a target gives the factors U sqrt(S) and
sqrt(S) V^T; a head keeps the d largest of its D directions. What does a rule give that has
seen nothing? The text tower stays as it is, the baseline's. Left out: their sinusoidal
positions. The four factors are from memory.
"""
import torch

out_dir = "out/mimetic_init"
query_noise: float = 0.7    # factor of Z in W_Q W_K^T
query_self: float = 0.7     # factor of I: tokens attend to those like them
value_noise: float = 0.4    # factor of Z in W_V W_proj
value_self: float = -0.4    # factor of I: what is attended to is subtracted


def _factors(width, noise, same, generator):
    """L (D, D) and R (D, D) with L @ R = noise Z + same I, largest directions first."""
    target = noise * torch.randn(width, width, generator=generator) / width ** 0.5
    target = target + same * torch.eye(width)
    left, size, right = torch.linalg.svd(target)
    return left * size.sqrt(), size.sqrt()[:, None] * right


@torch.no_grad()
def prepare_model(clip, config):
    if config.init or config.init_vision:
        raise ValueError("mimetic_init: leave out init and init_vision")
    generator = torch.Generator().manual_seed(config.seed)
    heads, width = clip.config.vision_heads, clip.config.vision_width
    for block in clip.vision.blocks:
        q, k, v = block.qkv.weight.chunk(3)                               # (D, D) each, views
        for q_head, k_head in zip(q.chunk(heads), k.chunk(heads)):        # (d, D) each
            left, right = _factors(width, config.query_noise, config.query_self, generator)
            q_head.copy_(left.T[:len(q_head)])
            k_head.copy_(right[:len(k_head)])
        left, right = _factors(width, config.value_noise, config.value_self, generator)
        v.copy_(left.T)
        block.out.weight.copy_(right.T)
