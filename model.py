"""CLIP: the image tower, the text tower, their sizes, and the files that weights live in.

    clip = CLIP(SIZES["ViT-B-32"])               # random weights
    clip = load_clip("ViT-B-32.pt")              # ours, OpenAI's, open_clip's, Hugging Face's

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"
(arXiv 2103.00020). Letters in the shape comments, where a file does not name its own:

    B batch          N vision tokens (1 + patches)   D width of a tower   E embedding
    S image side     L text tokens (at most 77)      H heads              d = D / H
    P patch side     T real text tokens of a batch   K patches kept       C classes
"""
import errno
import functools
import hashlib
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

FORMAT = "perceptual-clip 1"  # the field "format" of every checkpoint of ours


@dataclass(frozen=True)
class CLIPConfig:
    embed_dim: int  # E, the space that images and captions share
    image_size: int  # S
    patch_size: int  # P, a divisor of S
    vision_width: int
    vision_layers: int
    vision_heads: int
    context_length: int  # most tokens of a caption, start and end included
    vocab_size: int  # the last two ids are start and end
    text_width: int
    text_layers: int
    text_heads: int
    quick_gelu: bool = False  # x sigmoid(1.702 x) in place of GELU: a property of the weights


SIZES = {  # the paper's           E    S    P   vision       text
    "ViT-B-32": CLIPConfig(512, 224, 32, 768, 12, 12, 77, 49408, 512, 12, 8),
    "ViT-B-16": CLIPConfig(512, 224, 16, 768, 12, 12, 77, 49408, 512, 12, 8),
    "ViT-L-14": CLIPConfig(768, 224, 14, 1024, 24, 16, 77, 49408, 768, 12, 12),
    "ViT-H-14": CLIPConfig(1024, 224, 14, 1280, 32, 16, 77, 49408, 1024, 24, 16),
    "toy": CLIPConfig(64, 32, 8, 96, 3, 3, 32, 1024, 96, 3, 3),
}


# --------------------------------------- the towers ---------------------------------------

def linear(d_in, d_out, std, bias=True):
    """A linear layer with normal weights and no initial bias."""
    layer = nn.Linear(d_in, d_out, bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def attend(q, k, v, heads, causal=False, mask=None):
    """Attention of M tokens to N: q (B, M, D), k and v (B, N, D) -> (B, M, D).

    causal: no token sees those behind it. mask (B, 1, 1, N), bool: which may be seen.
    """
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, ., d)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and mask is None:
        # Written out: on a CPU the fused kernel's backward takes 4 times as long in bf16.
        scores = (q * q.shape[3] ** -0.5) @ k.mT  # (B, H, M, N)
        if causal:
            scores += torch.full_like(scores[0, 0], -math.inf).triu(1)
        y = scores.softmax(3) @ v  # (B, H, M, d)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return y.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Pre-norm transformer block. Its tower hands it the attention: q, k, v -> mixed values.

    Initial weights: OpenAI's formulas for its text tower. OpenAI leaves vision blocks to
    PyTorch's defaults; like Hugging Face we treat both alike.
    """

    def __init__(self, width, layers, quick_gelu):
        super().__init__()
        self.quick_gelu = quick_gelu
        shrink = (2 * layers) ** -0.5  # two additions to the residual stream a layer
        self.ln_1 = nn.LayerNorm(width)
        self.qkv = linear(width, 3 * width, width ** -0.5)
        self.out = linear(width, width, width ** -0.5 * shrink)
        self.ln_2 = nn.LayerNorm(width)
        self.fc = linear(width, 4 * width, (2 * width) ** -0.5)
        self.proj = linear(4 * width, width, width ** -0.5 * shrink)

    def forward(self, x, attention):
        """x (..., D) -> (..., D)."""
        q, k, v = self.qkv(self.ln_1(x)).chunk(3, dim=-1)  # (..., D)
        x = x + self.out(attention(q, k, v))
        return x + self.mlp(self.ln_2(x))

    def read(self, token, x, attention):
        """The same for one token of each sequence: token (B, 1, D), all x (..., D) -> (B, D).

        A tower is read at a single token, so its last block needs keys and values of all tokens
        but one query a sequence: 7 % less work in ViT-B-32's towers.
        """
        width, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
        q = F.linear(self.ln_1(token), weight[:width], bias[:width])  # (B, 1, D)
        k, v = F.linear(self.ln_1(x), weight[width:], bias[width:]).chunk(2, dim=-1)  # (..., D)
        x = token + self.out(attention(q, k, v))  # (B, 1, D)
        return (x + self.mlp(self.ln_2(x))).squeeze(1)

    def mlp(self, x):
        x = self.fc(x)  # (..., 4D)
        x = x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x)
        return self.proj(x)


def run_blocks(blocks, x, attention, recompute):
    """x (..., D) through blocks. recompute: only x is kept, backward runs each block again."""
    for block in blocks:
        if recompute:
            x = checkpoint(block, x, attention, use_reentrant=False)
        else:
            x = block(x, attention)
    return x


class VisionTower(nn.Module):
    """Images (B, 3, S, S), normalised -> embeddings (B, E), not yet of unit length."""

    def __init__(self, config):
        super().__init__()
        self.config, self.patch_size, self.info = config, config.patch_size, {}
        self.recompute = False  # True: activation checkpointing
        width, layers = config.vision_width, config.vision_layers
        std = width ** -0.5
        tokens = 1 + (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        self.position_embedding = nn.Parameter(std * torch.randn(tokens, width))
        self.patch_embed = nn.Linear(3 * config.patch_size ** 2, width, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(width, layers, config.quick_gelu) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.projection = linear(width, config.embed_dim, std, bias=False)

    def forward(self, images, keep=None, every=False):
        """-> the class token's embedding (B, E); every=True: all tokens' (B, N, E), it first.

        keep (B, K): the patches to run on, counted row by row from 0 (FLIP, arXiv 2212.00794).
        Nothing is interpolated: there must be as many patches as position embeddings.
        """
        side = self.patch_size
        x = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, 3, S/P, P, S/P, P)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N-1, 3PP)
        places = self.position_embedding[1:]  # (N-1, D)
        if keep is not None:
            x = x.take_along_dim(keep[:, :, None], 1)  # (B, K, 3PP)
            places = places[keep]  # (B, K, D)
        x = self.patch_embed(x) + places  # (B, N-1, D)
        first = self.class_embedding + self.position_embedding[0]  # (D,)
        x = self.ln_pre(torch.cat([first.expand(len(x), 1, -1), x], 1))  # (B, N, D)

        attention = functools.partial(attend, heads=self.config.vision_heads)
        blocks = self.blocks if every else self.blocks[:-1]
        x = run_blocks(blocks, x, attention, self.recompute)  # (B, N, D)
        if not every:
            x = self.blocks[-1].read(x[:, :1], x, attention)  # (B, D)
        return self.projection(self.ln_post(x))


class TextTower(nn.Module):
    """Token ids (B, L) int64 -> embeddings (B, E), not yet of unit length.

    Captions are packed: x is (T, D), the real tokens of all captions one after another. Linear
    layers and norms see no padding. Attention alone lays the tokens out as a table
    (B, longest, D) and takes them back. It is causal: none sees the padding behind its end.
    """

    def __init__(self, config):
        super().__init__()
        self.heads, self.recompute, self.compiled = config.text_heads, False, False
        width, layers = config.text_width, config.text_layers
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.position_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.blocks = nn.ModuleList(
            Block(width, layers, config.quick_gelu) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.projection = linear(width, config.embed_dim, width ** -0.5, bias=False)

    def forward(self, tokens, every=False):
        """-> the end token's embedding (B, E); every=True: all tokens' (B, longest, E).

        The end token is the highest id; behind it stand zeros.
        """
        ids, cells, ends, real = self.plan(tokens)
        places = F.embedding(cells % real.shape[1], self.position_embedding)  # (T, D)
        x = self.token_embedding(ids) + places  # (T, D)

        def table(x):  # (T, D) -> (B, longest, D), zeros behind the ends
            rows = x.new_zeros(real.numel(), x.shape[1]).index_copy_(0, cells, x)
            return rows.unflatten(0, real.shape)

        def attention(q, k, v):  # each (T, D) -> (T, D)
            y = attend(table(q), table(k), table(v), self.heads, causal=True)
            return y.flatten(0, 1).index_select(0, cells)

        def attention_of_ends(q, k, v):  # (B, 1, D), (T, D), (T, D) -> (B, 1, D)
            return attend(q, table(k), table(v), self.heads, mask=real[:, None, None])

        if self.compiled:  # lengths change with every batch, graphs do not
            attention = torch.compiler.disable(attention)
        blocks = self.blocks if every else self.blocks[:-1]
        x = run_blocks(blocks, x, attention, self.recompute)  # (T, D)
        if every:
            return table(self.projection(self.ln_final(x)))
        end_tokens = x.index_select(0, ends)[:, None]  # (B, 1, D)
        x = self.blocks[-1].read(end_tokens, x, attention_of_ends)  # (B, D)
        return self.projection(self.ln_final(x))

    def plan(self, tokens):
        """Token ids (B, L) -> where the real ones lie, planned on the host without a wait:

        ids (T,); cells (T,), their cells in a table (B, longest), counted row by row;
        ends (B,), which of the T are end tokens; real (B, longest), which cells are filled.
        """
        tokens, device = tokens.cpu(), self.position_embedding.device
        lengths = tokens.argmax(1) + 1  # (B,)
        real = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, longest)
        cells = real.flatten().nonzero().squeeze(1)  # (T,)
        ids = tokens[:, :real.shape[1]].flatten()[cells]  # (T,)
        plan = [ids, cells, lengths.cumsum(0) - 1, real]
        if device.type == "cuda":  # a copy from pinned memory does not stop the host
            plan = [tensor.pin_memory() for tensor in plan]
        return [tensor.to(device, non_blocking=True) for tensor in plan]

    def compile(self, **options):
        """Compiles the blocks in place: one graph for any T, with attention outside it."""
        self.compiled = True
        for block in self.blocks:
            block.compile(dynamic=True, **options)


class CLIP(nn.Module):
    """Both towers and `logit_scale`, the log of the factor on the cosines (1 / temperature).

    `extra` is for what only training needs: recipes hang parameters and modules on it. They are
    in the state dict; load_clip and load_vision leave them out.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vocabulary = None  # text of the .tiktoken file
        self.info = {}  # origin of the weights
        self.text, self.vision = TextTower(config), VisionTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.extra = nn.Module()

    def encode_image(self, images):
        """Images (B, 3, S, S), normalised -> (B, E) of unit length, in the weights' fp32."""
        return F.normalize(self.vision(images).to(self.logit_scale.dtype), dim=-1)

    def encode_text(self, tokens):
        """Token ids (B, L), best left on the host -> (B, E) of unit length, in fp32."""
        return F.normalize(self.text(tokens).to(self.logit_scale.dtype), dim=-1)

    def forward(self, images, tokens):
        """-> image embeddings (B, E), text embeddings (B, E), the scale () of their cosines."""
        return self.encode_image(images), self.encode_text(tokens), self.logit_scale.exp()


def optimizer_groups(module, weight_decay):
    """AdamW's groups, decayed and not: dicts of params, names and weight_decay.

    Not decayed: what has less than two dimensions (gains, biases, class embedding, temperature)
    and position embeddings. Frozen parameters are in neither.
    """
    decayed = {"params": [], "names": [], "weight_decay": weight_decay}
    others = {"params": [], "names": [], "weight_decay": 0.0}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            small = parameter.ndim < 2 or name.endswith("position_embedding")
            group = others if small else decayed
            group["params"].append(parameter)
            group["names"].append(name)
    return [decayed, others]


# ----------------------------------------- costs ------------------------------------------

PEAK_TFLOPS = {  # dense bf16 by the makers' data sheets; "H100" is the last of its kind
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
    "L40S": 362, "L4": 121, "A10": 125, "RTX 4090": 165, "RTX 3090": 71, "MI300X": 1307}


def flops_per_pair(config, text_tokens=None):
    """Operations to train on a pair whose caption has `text_tokens` tokens (None: all 77).

    A multiply-add is 2. A token costs a layer 6DD (qkv) + 2DD (out) + 16DD (MLP) + 4D * tokens
    (attention), a patch 6PPD, a projection 2DE; backward is twice forward. ViT-B-32:
    3 * (8.82 + 5.96) = 44.3 GFLOP. Masked scores and all of the last blocks count.
    """
    def blocks(tokens, width, layers):
        return layers * tokens * (24 * width ** 2 + 4 * width * tokens)

    patches = (config.image_size // config.patch_size) ** 2
    vision = blocks(1 + patches, config.vision_width, config.vision_layers)
    text = blocks(text_tokens or config.context_length, config.text_width, config.text_layers)
    patch_embed = 6 * patches * config.patch_size ** 2 * config.vision_width
    projections = 2 * (config.vision_width + config.text_width) * config.embed_dim
    return 3.0 * (vision + text + patch_embed + projections)


def peak_flops(device_name):
    """Dense bf16 FLOP/s of a torch.cuda.get_device_name(); None if it is unknown."""
    for name, tera in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return tera * 1e12
    return None


# ----------------------------------------- files ------------------------------------------

def write_checkpoint(path, content):
    """Writes a file that, whenever we are stopped, is the old one or the new one."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name has to reach the disk as well
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as some network disks answer
                raise
        finally:
            os.close(folder)
    except RuntimeError as error:  # torch's zip writer hides the OSError that stopped it
        raise OSError(f"{path}: {error.__context__ or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def host_copy(value):
    """Nested dicts, lists and tuples with their tensors copied to the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: host_copy(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(host_copy(entry) for entry in value)
    return value


def read_checkpoint(path):
    """One of our checkpoints as a dict; one-line ValueError or FileNotFoundError otherwise."""
    from data.weights import read_file
    content = read_file(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this project (no format={FORMAT!r})")
    return content


def weights_checksum(weights):
    """16 hex digits: sha256 over names and bytes of a state dict, in the names' order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_clip(path, quick_gelu=None):
    """A CLIP in eval mode: our file, OpenAI's, open_clip's, or Hugging Face's file or folder.

    Its GELU is the quick one in OpenAI's files, else as the config beside a foreign file says,
    else as `quick_gelu` says. ValueError or FileNotFoundError, also if nothing says it.
    """
    clip = load(path, quick_gelu)
    if isinstance(clip, VisionTower):
        raise ValueError(f"{path}: a vision tower alone (stage 1); a whole CLIP is needed here")
    return clip


def load_vision(path, quick_gelu=None):
    """The vision tower, in eval mode, of a stage-1 checkpoint or of a CLIP; see load_clip."""
    module = load(path, quick_gelu)
    vision = module if isinstance(module, VisionTower) else module.vision
    vision.info = module.info
    return vision


def load(path, quick_gelu=None):
    """The module in a weights file: all its tensors and no other, each in its shape."""
    from data import weights as files  # only to read and write files is this needed
    path = files.weights_file(path)
    content = files.read_file(path)
    if content.get("format") == FORMAT:
        layout, fields = "ours", content["model"]
        weights = files.without_extra(content["weights"])
    else:
        layout, fields, weights = files.recognise(path, content, quick_gelu)
    module_type = VisionTower if content.get("kind") == "vision" else CLIP
    with torch.device("meta"):  # shapes without memory or random draws
        module = module_type(CLIPConfig(**fields))
    weights = files.to_ours(path, weights, module.state_dict(), layout)
    module.load_state_dict(weights, assign=True)
    module.vocabulary = content.get("vocabulary")
    module.info = {"path": str(path), "sha256": files.sha256(path), "format": layout,
                   "step": content.get("step"), "samples": content.get("samples"),
                   "config": content.get("config", {})}
    return module.eval()


def copy_weights(path, module, quick_gelu=None):
    """Put the weights of a file into a CLIP or VisionTower of the same shape, every tensor.

    Returns a line that says so. ValueError if a size differs. quick_gelu: see load_clip.
    """
    whole = isinstance(module, CLIP)
    load_source = load_clip if whole else load_vision
    source = load_source(path, quick_gelu=quick_gelu)
    for field, ours in asdict(module.config).items():
        theirs = getattr(source.config, field)
        of_text = field.startswith(("text", "vocab", "context"))
        if theirs != ours and (whole or not of_text):
            raise ValueError(f"{path}: its {field} is {theirs}, this run's {ours}")
    if whole and source.vocabulary and module.vocabulary not in (None, source.vocabulary):
        raise ValueError(f"{path}: its vocabulary is not this run's")
    weights = source.state_dict()
    module.load_state_dict(weights)
    return f"{path}: {len(weights)} tensors, checksum {weights_checksum(weights)}"
