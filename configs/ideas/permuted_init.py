"""Control: stage 1's tower with the entries of each tensor permuted.

    python pretrain.py configs/toy_pi.py configs/ideas/permuted_init.py

Each tensor keeps its values, and with them their mean, scale and spread; what the
judgements wrote into their arrangement is gone. Is perceptual initialization more than
weights of a better scale? The permutation comes from the seed. The recipe that it changes
must name a tower (init_vision).
"""
import torch

out_dir = "out/permuted_init"


def prepare_model(clip, config):
    if not config.init_vision:
        raise ValueError("permuted_init: no tower to permute; set init_vision")
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for parameter in clip.vision.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
