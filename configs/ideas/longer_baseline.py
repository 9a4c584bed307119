"""Control: the baseline, with as many more steps as the compute of stage 1 is worth.

    python perceptual_init.py configs/toy_nights.py
    python pretrain.py configs/toy.py configs/ideas/longer_baseline.py

Is perceptual initialization more than the extra compute? Operations, by
model.flops_per_pair:
    stage 1:  its triplets * 3 pictures * F(vision tower)
    a step:   batch_size * (F(vision tower) + F(text tower at the mean length of a caption))
where F counts forward and backward. max_steps grows by the quotient, rounded up, and the
cosine ends at the new last step. Not counted: stage 1's looks at validation triplets.
"""
import dataclasses
import math

from model import CLIPConfig, SIZES, flops_per_pair, read_checkpoint

out_dir = "out/longer_baseline"
stage_1: str = "out/toy_nights/ckpt.pt"   # the tower whose compute is spent; it is not loaded


def _extra_steps(tower, tokens, config):
    """Steps as dear as stage 1. tower: its checkpoint; tokens: mean length of a caption."""
    vision = dataclasses.replace(CLIPConfig(**tower["model"]), text_layers=0, text_width=0)
    both = dataclasses.replace(SIZES[config.model], image_size=config.image_size)
    spent = tower["samples"] * 3 * flops_per_pair(vision)
    return math.ceil(spent / (config.batch_size * flops_per_pair(both, tokens)))


def choose_pairs(shards, config):
    tower = read_checkpoint(config.stage_1)
    if tower["kind"] != "vision":
        raise ValueError(f"stage_1={config.stage_1}: holds a CLIP; name a tower of stage 1")
    first = range(min(len(shards), 1000))
    tokens = sum(len(shards.ids(pair, 0)) + 2 for pair in first) / len(first)  # and start, end
    tokens = min(tokens, config.context_length)
    steps = config.max_steps or config.epochs * (len(shards) // config.batch_size)
    config.max_steps = steps + _extra_steps(tower, tokens, config)     # main reads it next
    return range(len(shards))
