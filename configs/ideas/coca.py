"""CoCa: beside the contrast, a decoder that sees the picture writes the caption, word by word.

    python pretrain.py configs/toy.py configs/ideas/coca.py

Loss: InfoNCE + 2 * mean over captions of the mean over their words of -log p(word | words
before it, picture) (arXiv 2205.01917; formula from the abstract only, the 2 from memory).
The text tower is causal. A decoder layer behind it reads its tokens, causally too, and all
tokens of the vision tower. Left out: their attentional poolers, their class token of the
text (the end token serves). All captions weigh alike, also those of few words.
"""
import torch
import torch.nn.functional as F
from torch import nn

from configs import original

out_dir = "out/coca"
captioning: float = 2.0   # weight of the words' loss; 0: plain CLIP


def _decoder(width):
    return nn.TransformerDecoderLayer(width, max(1, width // 64), 4 * width, dropout=0.0,
                                      activation="gelu", batch_first=True, norm_first=True)


def prepare_model(clip, config):
    clip.extra.decoder = _decoder(clip.config.embed_dim)
    clip.extra.words = nn.Linear(clip.config.embed_dim, clip.config.vocab_size)


def _tokens(clip, batch):
    """All tokens of pictures (b, N, E) and of captions (b, longest, E)."""
    return clip.vision(batch["views"], every=True), clip.text(batch["tokens"], every=True)


def _word_logits(clip, patches, words):
    """Logits (b, longest, V) of the word behind each of `words` (b, longest, E)."""
    length = words.shape[1]
    behind = torch.ones(length, length, dtype=torch.bool, device=words.device).triu(1)
    return clip.extra.words(clip.extra.decoder(words, patches, tgt_mask=behind))


def _rows(clip, batch, patches, words):
    ids = batch["tokens"][:, :words.shape[1]].to(words.device)            # (b, longest)
    ends = ids.argmax(1)                                                  # (b,)
    logits = _word_logits(clip, patches, words)[:, :-1].float()
    losses = F.cross_entropy(logits.mT, ids[:, 1:], reduction="none")     # (b, longest - 1)
    real = torch.arange(ids.shape[1] - 1, device=ids.device) < ends[:, None]
    text = words[torch.arange(len(ids), device=ids.device), ends]         # (b, E)
    return {"image": F.normalize(patches[:, 0].float(), dim=-1),
            "text": F.normalize(text.float(), dim=-1), "scale": clip.logit_scale.exp(),
            "captioning": (losses * real).sum(1) / ends}                  # (b,)


def encode(clip, batch, config):
    return _rows(clip, batch, *_tokens(clip, batch))


def global_loss(rows, config, ranks):
    contrast = original("global_loss")(rows, config, ranks)
    return contrast + config.captioning * rows["captioning"].mean()
