"""Mod-X: a trained CLIP learns a narrow domain, and its cosines between different pairs stay.

    python pretrain.py configs/toy.py configs/ideas/modx.py --init=out/toy/ckpt.pt

Loss: InfoNCE + keep * KL(softmax of the first model's row of cosines || softmax of the row
now), averaged over both directions, without a temperature; a row in which the first model is
wrong about the pair counts as 0 (arXiv 2305.07437, formula as in the authors' code). Theirs is
0.1 times the sum over 70 pairs, ours a mean over pairs. The domain is a setting of zscl.py;
keep=0 is plain fine-tuning.
Left out: chains of domains, each of which starts from the last one's model.
"""
import torch
import torch.nn.functional as F

from configs import original
from configs.ideas.zscl import choose_pairs, prepare_model  # noqa: F401

out_dir = "out/modx"
keep = 7.0   # weight of the divergence, a setting of zscl.py


def encode(clip, batch, config):
    rows = original("encode")(clip, batch, config)
    with torch.no_grad():
        first = original("encode")(clip.extra.first, batch, config)
    rows["first_image"], rows["first_text"] = first["image"], first["text"]       # (b, E)
    return rows


# How far the rows of cosines of `one` with all `other` have moved, where they were right: ().
def _moved(rows, one, other, ranks):
    everyone, of_first = ranks.gather(rows[other], rows[f"first_{other}"])        # (B, E)
    now = (rows[one] @ everyone.T).log_softmax(1)                                 # (b, B)
    before = rows[f"first_{one}"] @ of_first.T                                    # (b, B)
    own = ranks.rank * len(before) + torch.arange(len(before), device=before.device)
    divergence = F.kl_div(now, before.softmax(1), reduction="none").sum(1)        # (b,)
    return (divergence * (before.argmax(1) == own)).mean()


def global_loss(rows, config, ranks):
    moved = _moved(rows, "image", "text", ranks) + _moved(rows, "text", "image", ranks)
    return original("global_loss")(rows, config, ranks) + config.keep * moved / 2
