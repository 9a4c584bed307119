"""CLIP: the image tower, the text tower, their sizes, and the files their weights live in.

    clip = CLIP(SIZES["ViT-B-32"])                       # random weights, as OpenAI draws them
    clip = load_clip("ViT-B-32.pt")                      # ours, OpenAI's, open_clip's, Hugging Face's
    python model.py out/run/ckpt.pt exported.pt openai   # (or open_clip, huggingface): write for others

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"
(arXiv 2103.00020). Letters in shape comments, here and in every other file:

    B batch            N vision tokens (1 + patches)    D width of a tower     E embedding
    S image side       L text tokens (<= 77)            H heads                C classes
    P patch side       T rows of a flat token matrix    d = D / H
"""
import hashlib
import json
import math
import os
import pickle
import re
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

FORMAT = "perceptual-clip 1"          # first field of every checkpoint we write
MEAN = (0.48145466, 0.4578275, 0.40821073)       # the pixel statistics CLIP was trained with
STD = (0.26862954, 0.26130258, 0.27577711)
TEXT_CHUNKS = 8  # captions of a batch, sorted by length, run in this many groups


@dataclass(frozen=True)
class CLIPConfig:
    embed_dim: int                # E, the space that images and captions share
    image_size: int               # S
    patch_size: int               # P; must divide S
    vision_width: int
    vision_layers: int
    vision_heads: int
    context_length: int           # the most tokens of a caption, start and end included
    vocab_size: int               # the last two ids are start and end
    text_width: int
    text_layers: int
    text_heads: int
    quick_gelu: bool = False      # x * sigmoid(1.702 x) instead of GELU: a property of the weights


SIZES = {  # METHOD.md 3.                   E    S    P   vision           text
    "ViT-B-32": CLIPConfig(512, 224, 32, 768, 12, 12, 77, 49408, 512, 12, 8),
    "ViT-B-16": CLIPConfig(512, 224, 16, 768, 12, 12, 77, 49408, 512, 12, 8),
    "ViT-L-14": CLIPConfig(768, 224, 14, 1024, 24, 16, 77, 49408, 768, 12, 12),
    "ViT-H-14": CLIPConfig(1024, 224, 14, 1280, 32, 16, 77, 49408, 1024, 24, 16),
    "toy": CLIPConfig(64, 32, 8, 96, 3, 3, 32, 1024, 96, 3, 3),
}


# ---------------------------------------------------------------------------------------------
# The towers
# ---------------------------------------------------------------------------------------------

class Block(nn.Module):
    """Pre-norm transformer block on a flat matrix of tokens.

    Sequences of any lengths lie one after another in x (T, D), where `spans`, a tuple of
    (count, length), says how they are cut: T = sum(count * length). Everything but attention
    is one large matrix product, however ragged the batch is.
    """

    def __init__(self, width, heads, quick_gelu):
        super().__init__()
        self.heads, self.quick_gelu = heads, quick_gelu
        self.ln_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)

    def forward(self, x, spans, causal):
        """x (T, D) -> (T, D)."""
        qkv = self.qkv(self.ln_1(x))  # (T, 3D)
        mixed = []
        for part, (count, length) in zip(qkv.split([n * m for n, m in spans]), spans):
            part = part.view(count, length, 3, self.heads, -1)
            q, k, v = part.permute(2, 0, 3, 1, 4)  # each (count, H, length, d)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            mixed.append(y.transpose(1, 2).reshape(count * length, -1))  # (count * length, D)
        return self.mlp(x + self.out(torch.cat(mixed)))

    def read(self, x, spans, rows, ends=None):
        """The same block for one token per sequence: x (T, D), rows (B,) -> (B, D).

        What the tower reads out at its end is a single token, so its last block needs keys and
        values of all tokens but one query a sequence. `ends` (B,): the query's place within its
        sequence, beyond which it may not look (causal); None: it sees the whole sequence.
        """
        width = x.shape[1]
        h = self.ln_1(x)  # (T, D)
        q = F.linear(h[rows], self.qkv.weight[:width], self.qkv.bias[:width])  # (B, D)
        kv = F.linear(h, self.qkv.weight[width:], self.qkv.bias[width:])  # (T, 2D)
        counts = [count for count, _ in spans]
        masks = [None] * len(spans) if ends is None else ends.split(counts)
        mixed = []
        for q, kv, mask, (count, length) in zip(
                q.split(counts), kv.split([n * m for n, m in spans]), masks, spans):
            q = q.view(count, 1, self.heads, -1).transpose(1, 2)  # (count, H, 1, d)
            k, v = kv.view(count, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
            if mask is not None:
                mask = torch.arange(length, device=x.device) <= mask[:, None]  # (count, length)
                mask = mask[:, None, None]  # (count, 1, 1, length)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            mixed.append(y.reshape(count, width))
        return self.mlp(x[rows] + self.out(torch.cat(mixed)))

    def mlp(self, x):
        h = self.fc(self.ln_2(x))  # (T, 4D)
        h = h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h)
        return x + self.proj(h)  # (T, D)


def run_blocks(tower, x, spans, rows, ends=None):
    """x (T, D) through the tower's blocks -> the tokens at `rows` (B, D)."""
    for block in tower.blocks[:-1]:
        if tower.recompute:  # keep x only; the backward pass computes the block again
            x = checkpoint(block, x, spans, ends is not None, use_reentrant=False)
        else:
            x = block(x, spans, ends is not None)
    return tower.blocks[-1].read(x, spans, rows, ends)


def initialise(tower, width, layers):
    """Weights of OpenAI's published initialisation (CLIP.initialize_parameters), biases zero.

    OpenAI applies it to the text tower and leaves the vision blocks to PyTorch's defaults; like
    Hugging Face we apply it to both. The patch embedding keeps the default, U(+-1/sqrt(fan_in)).
    """
    stds = {"qkv": width ** -0.5, "out": width ** -0.5 * (2 * layers) ** -0.5,
            "fc": (2 * width) ** -0.5, "proj": width ** -0.5 * (2 * layers) ** -0.5}
    for block in tower.blocks:
        for name, std in stds.items():
            nn.init.normal_(getattr(block, name).weight, std=std)
            nn.init.zeros_(getattr(block, name).bias)
    nn.init.normal_(tower.projection.weight, std=width ** -0.5)


class VisionTower(nn.Module):
    """Images (B, 3, S, S), normalised floats -> embeddings (B, E), not of unit length."""

    def __init__(self, config):
        super().__init__()
        width, self.patch_size = config.vision_width, config.patch_size
        self.config = config
        self.recompute = False
        tokens = 1 + (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.position_embedding = nn.Parameter(width ** -0.5 * torch.randn(tokens, width))
        self.patch_embed = nn.Linear(3 * config.patch_size ** 2, width, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.vision_heads, config.quick_gelu)
                                    for _ in range(config.vision_layers))
        self.ln_post = nn.LayerNorm(width)
        self.projection = nn.Linear(width, config.embed_dim, bias=False)
        initialise(self, width, config.vision_layers)

    def forward(self, images):
        size, p = images.shape[0], self.patch_size
        x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, 3, S/P, P, S/P, P)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N-1, 3PP)
        x = self.patch_embed(x)  # (B, N-1, D)
        first = self.class_embedding.expand(size, 1, -1)
        x = torch.cat([first, x], 1) + self.position_embedding  # (B, N, D)
        tokens = x.shape[1]
        x = self.ln_pre(x).flatten(0, 1)  # (B*N, D)
        rows = torch.arange(0, size * tokens, tokens, device=x.device)
        x = run_blocks(self, x, ((size, tokens),), rows)  # (B, D)
        return self.projection(self.ln_post(x))  # (B, E)


class TextTower(nn.Module):
    """Token ids (B, L) int64, zero padded -> embeddings (B, E), not of unit length.

    Causal; the feature is read at the end token, which has the highest id. Tokens behind it
    therefore change nothing and are not computed (`without_padding`).
    """

    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.recompute = False
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.blocks = nn.ModuleList(Block(width, config.text_heads, config.quick_gelu)
                                    for _ in range(config.text_layers))
        self.ln_final = nn.LayerNorm(width)
        self.projection = nn.Linear(width, config.embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        initialise(self, width, config.text_layers)

    def forward(self, tokens):
        x, spans, rows, ends, back = self.without_padding(tokens)
        x = run_blocks(self, x, spans, rows, ends)  # (B, D), sorted by length
        return self.projection(self.ln_final(x))[back]  # (B, E), in the given order

    @torch.compiler.disable
    def without_padding(self, tokens):
        """Sorts captions by length and cuts them in TEXT_CHUNKS groups, each to its longest.

        tokens (B, L) -> x (T, D) embedded rows; spans; rows (B,) of the end tokens in x and
        `ends` (B,), their places in the caption; back (B,) undoes the sorting. Exact, since the
        tower is causal. Lengths are needed on the host: tokens that lie there cost no wait for
        the device. Stays outside torch.compile, whose graph then knows sizes only.
        """
        device = self.position_embedding.device
        tokens = tokens.cpu()
        ends, order = tokens.argmax(1).sort()
        ids, spans, rows, places = [], [], [], []
        for chosen, end in zip(order.chunk(TEXT_CHUNKS), ends.chunk(TEXT_CHUNKS)):
            count, length = len(end), int(end[-1]) + 1
            first = sum(n * m for n, m in spans)
            rows.append(first + torch.arange(count) * length + end)
            ids.append(tokens[chosen, :length].flatten())
            spans.append((count, length))
        ids, rows, ends, back = (to_device(t, device) for t in (
            torch.cat(ids), torch.cat(rows), ends, order.argsort()))
        places = [self.position_embedding[:m].repeat(n, 1) for n, m in spans]
        return self.token_embedding(ids) + torch.cat(places), tuple(spans), rows, ends, back


def to_device(tensor, device):
    """A host tensor to the device without waiting for it: pinned memory, asynchronous copy."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class CLIP(nn.Module):
    """Both towers and the temperature. `logit_scale` is the log of what multiplies the cosines."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vocabulary, self.info = None, {}  # text of the .tiktoken file; origin (load_clip)
        self.text = TextTower(config)  # drawn first: one seed, one text tower in every arm
        self.vision = VisionTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images):
        """Images (B, 3, S, S), normalised -> (B, E) fp32 of unit length."""
        return F.normalize(self.vision(images).float(), dim=-1)

    def encode_text(self, tokens):
        """Token ids (B, L), best left on the host -> (B, E) fp32 of unit length."""
        return F.normalize(self.text(tokens).float(), dim=-1)

    def forward(self, images, tokens):
        """-> image embeddings (B, E), text embeddings (B, E), scale () of their cosines."""
        return self.encode_image(images), self.encode_text(tokens), self.logit_scale.exp()


def optimizer_groups(module, weight_decay):
    """Two AdamW groups, decayed and not, of the parameters that require gradients.

    METHOD.md 3: no decay on gains, biases, class and position embeddings, temperature; those
    are what has fewer than two dimensions, and the position embeddings.
    """
    groups = [{"params": [], "names": [], "weight_decay": wd} for wd in (weight_decay, 0.0)]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = groups[parameter.ndim < 2 or name.endswith("position_embedding")]
            group["params"].append(parameter)
            group["names"].append(name)
    return groups


# ---------------------------------------------------------------------------------------------
# Our checkpoints
# ---------------------------------------------------------------------------------------------

def write_checkpoint(path, content):
    """Writes so that a crash at any moment leaves the old file or the new one, never a mixture."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_checkpoint(path):
    """One of our checkpoints as a dict; a one-line ValueError for anything else."""
    content = read_tensors(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this project (no format={FORMAT!r} in it)")
    return content


def read_tensors(path):
    """Any weights file as a dict, without running code from it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint or weights file is expected")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        danger = f"it would run {code[1]} when read" if code else "not a weights file"
        raise ValueError(f"{path}: refused: {danger}") from None
    except (RuntimeError, EOFError):
        raise ValueError(f"{path}: cut short or not a weights file") from None


def weights_checksum(weights):
    """First 16 hex digits of a sha256 over names and bytes of a state dict, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_clip(path, device="cpu", quick_gelu=None):
    content = read_checkpoint(path)
    if content["kind"] != "clip":
        raise ValueError(f"{path}: holds a vision tower only (stage 1), a whole CLIP is needed")
    clip = CLIP(CLIPConfig(**content["model"]))
    clip.load_state_dict(content["weights"])
    clip.vocabulary = content["vocabulary"]
    clip.info = {"path": str(path), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
                 "format": "ours", "step": content["step"], "samples": content["samples"]}
    return clip.to(device).eval()


def load_vision(path, device="cpu"):
    content = read_checkpoint(path)
    if content["kind"] != "vision":
        clip = load_clip(path, device)
        clip.vision.info = clip.info
        return clip.vision
    vision = VisionTower(CLIPConfig(**content["model"]))
    vision.load_state_dict(content["weights"])
    vision.info = {"path": str(path), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
                   "format": "ours", "step": content["step"], "samples": content["samples"]}
    return vision.to(device).eval()


def flops_per_pair(config, text_tokens=None):
    """Floating point operations to train on one pair."""
    def tower(tokens, width, layers):
        return layers * tokens * (24 * width ** 2 + 4 * tokens * width)
    patches = (config.image_size // config.patch_size) ** 2
    vision = tower(1 + patches, config.vision_width, config.vision_layers)
    vision += 2 * patches * 3 * config.patch_size ** 2 * config.vision_width
    text = tower(text_tokens or config.context_length, config.text_width, config.text_layers)
    heads = 2 * (config.vision_width + config.text_width) * config.embed_dim
    return 3.0 * (vision + text + heads)


def peak_flops(device_name):
    return None
