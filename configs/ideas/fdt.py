"""FDT: pictures and captions are written in the words of one codebook, and those are compared.

    python pretrain.py configs/toy.py configs/ideas/fdt.py --benchmarks=data/toy/benchmarks

q(x): each token of a tower through a small MLP; c: the K codes (E,), shared by both towers.
    w = sparsemax over the codes of (max over tokens of q(x) . c) / (t sqrt E)     z = sum of w c
InfoNCE compares the z of unit length (arXiv 2303.14865; formula read in the authors' code).
sparsemax is the nearest point of the simplex (arXiv 1602.02068): most codes get exactly 0.
The codes are part of the model: evaluate.py, which builds plain towers, refuses its
checkpoints. Zero-shot figures are those that the run writes at its end. Their t starts at
1,000 and may decay; here it stays. Their padding scores 0, here it has no say. Left out:
the DeCLIP variant.
"""
import types

import torch
import torch.nn.functional as F
from torch import nn

out_dir = "out/fdt"
codes: int = 256            # K; theirs is 16,384
temperature: float = 10.0   # t: the higher, the more codes a picture has


def _sparsemax(scores):
    """(B, K) -> weights (B, K) of at least 0 that sum to 1, nearest to the scores."""
    ordered = scores.sort(dim=1, descending=True).values                  # (B, K)
    excess = ordered.cumsum(1) - 1                                        # of the k largest
    count = torch.arange(1, scores.shape[1] + 1, device=scores.device)    # (K,)
    kept = (count * ordered > excess).sum(1, keepdim=True)                # (B, 1)
    return F.relu(scores - excess.gather(1, kept - 1) / kept)


def _weights(clip, tower, tokens, real):
    """Tokens (B, N, E) of a tower -> weights of the codes (B, K); real (B, N): not padding."""
    scores = (tower.query(tokens) @ clip.codebook.T).float()              # (B, N, K)
    scores = scores.masked_fill(~real[:, :, None], -torch.inf)
    return _sparsemax(scores.amax(1) / clip.sharpness)


def _mixed(clip, weights):
    """(B, K) -> their sum of codes, of unit length (B, E) in float32."""
    return F.normalize((weights @ clip.codebook).float(), dim=-1)


def _encode_image(clip, images):
    tokens = clip.vision(images, every=True)                              # (B, N, E)
    real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return _mixed(clip, _weights(clip, clip.vision, tokens, real))


def _encode_text(clip, ids):
    tokens = clip.text(ids, every=True)                                   # (B, longest, E)
    real = torch.arange(tokens.shape[1]) <= ids.cpu().argmax(1)[:, None]  # up to the end token
    return _mixed(clip, _weights(clip, clip.text, tokens, real.to(tokens.device)))


def prepare_model(clip, config):
    width = clip.config.embed_dim
    clip.sharpness = config.temperature * width ** 0.5
    clip.codebook = nn.Parameter(torch.randn(config.codes, width))
    for tower in (clip.vision, clip.text):
        tower.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(),
                                    nn.LayerNorm(width), nn.Linear(width, width))
    clip.encode_image = types.MethodType(_encode_image, clip)
    clip.encode_text = types.MethodType(_encode_text, clip)
