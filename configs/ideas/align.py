"""ALIGN's loss: InfoNCE whose targets are smoothed, as captions of the web may be wrong.

    python pretrain.py configs/toy.py configs/ideas/align.py

The target of a row: a / B for each of the B pairs, and 1 - a more for its own. The loss is the
cross-entropy with it, in both directions (arXiv 2102.05918; formula from the abstract only,
a = 0.1 from memory). smoothing = 0 is the plain loss.
Left out: 1.8 billion pairs, the convolutional image tower, BERT. loss_chunk has no effect.
"""
import torch
import torch.nn.functional as F

out_dir = "out/align"
smoothing: float = 0.1   # a, the share of a target that all pairs of the batch divide


def global_loss(rows, config, ranks):
    images, texts = ranks.gather(rows["image"], rows["text"])             # (B, E) each
    b, device = len(rows["image"]), images.device
    own = ranks.rank * b + torch.arange(b, device=device)                 # (b,)
    to_texts = rows["scale"] * rows["image"] @ texts.T                    # (b, B)
    to_images = rows["scale"] * rows["text"] @ images.T                   # (b, B)
    image_loss = F.cross_entropy(to_texts, own, label_smoothing=config.smoothing)
    text_loss = F.cross_entropy(to_images, own, label_smoothing=config.smoothing)
    return (image_loss + text_loss) / 2
