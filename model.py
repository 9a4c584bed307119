"""CLIP: the image tower, the text tower, their sizes, and the files that weights live in.

    clip = CLIP(SIZES["ViT-B-32"])                   # random weights
    clip = load_clip("ViT-B-32.pt")                  # ours, OpenAI's, open_clip's, Hugging Face's
    export_clip(clip, "clip.pt", "open_clip")        # or "openai"; "huggingface": a folder

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"
(arXiv 2103.00020). Letters in the shape comments of every file:

    B batch          N vision tokens (1 + patches)   D width of a tower   E embedding
    S image side     L text tokens (at most 77)      H heads              d = D / H
    P patch side     T rows of a flat token matrix   C classes
"""
import hashlib
import math
import os
import pickle
import re
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

FORMAT = "perceptual-clip 1"  # the field "format" of every checkpoint of ours
TEXT_GROUPS = 8  # captions sorted by length run in this many groups, each cut to its longest


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


def linear(d_in, d_out, std, bias=True):
    """A linear layer with normal weights and no initial bias."""
    layer = nn.Linear(d_in, d_out, bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def attend(qkv, spans, heads, causal):
    """Attention within each sequence of a flat matrix (see Block): qkv (T, 3D) -> (T, D)."""
    mixed, fused = [], qkv.device.type != "cpu" or qkv.dtype != torch.bfloat16
    for part, (count, length) in zip(qkv.split([n * m for n, m in spans]), spans):
        q, k, v = (x.transpose(1, 2) for x in part.view(count, length, 3, heads, -1).unbind(2))
        if fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (count, H, length, d)
        else:  # written out: on a CPU the fused kernel's bf16 backward takes 4 times as long
            scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (count, H, length, length)
            if causal:
                scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(1)
            y = scores.softmax(-1) @ v
        mixed.append(y.transpose(1, 2).reshape(count * length, -1))  # (count * length, D)
    return torch.cat(mixed)


class Block(nn.Module):
    """Pre-norm transformer block on a flat matrix of tokens x (T, D).

    Sequences lie one after another; `spans`, a tuple of (count, length), says how to cut them:
    T = sum of count * length. However ragged a batch, all but attention is one matrix product.
    Initial weights: OpenAI's formulas for its text tower. OpenAI leaves vision blocks to PyTorch's
    defaults; like Hugging Face we treat both alike. The patch embedding keeps the default.
    """
    attention = staticmethod(attend)

    def __init__(self, width, layers, heads, quick_gelu):
        super().__init__()
        self.heads, self.quick_gelu = heads, quick_gelu
        shrink = (2 * layers) ** -0.5  # two additions to the residual stream a layer
        self.ln_1 = nn.LayerNorm(width)
        self.qkv = linear(width, 3 * width, width ** -0.5)
        self.out = linear(width, width, width ** -0.5 * shrink)
        self.ln_2 = nn.LayerNorm(width)
        self.fc = linear(width, 4 * width, (2 * width) ** -0.5)
        self.proj = linear(4 * width, width, width ** -0.5 * shrink)

    def forward(self, x, spans, causal):
        """x (T, D) -> (T, D). Only text is causal, and only text is ragged."""
        qkv = self.qkv(self.ln_1(x))  # (T, 3D)
        return self.mlp(x + self.out(self.attention(qkv, spans, self.heads, causal)))

    def read(self, x, spans, rows, ends=None):
        """The same for one token a sequence: x (T, D), rows (B,) of x -> (B, D).

        A tower is read at a single token, so its last block needs keys and values of all tokens
        but one query a sequence: a twelfth less work in ViT-B-32's towers. `ends` (B,): the
        query's place in its sequence, which hides what is behind it (causal).
        """
        width, counts, sizes = x.shape[1], [n for n, _ in spans], [n * m for n, m in spans]
        h = self.ln_1(x)  # (T, D)
        queries = F.linear(h.index_select(0, rows), self.qkv.weight[:width], self.qkv.bias[:width])
        keys_values = F.linear(h, self.qkv.weight[width:], self.qkv.bias[width:])  # (T, 2D)
        ends, mixed = [None] * len(spans) if ends is None else ends.split(counts), []
        parts = zip(queries.split(counts), keys_values.split(sizes), ends, spans)
        for q, kv, end, (count, length) in parts:
            q = q.view(count, 1, self.heads, -1).transpose(1, 2)  # (count, H, 1, d)
            k, v = kv.view(count, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
            mask = None if end is None else (  # (count, 1, 1, length)
                torch.arange(length, device=x.device) <= end[:, None, None, None])
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (count, H, 1, d)
            mixed.append(y.reshape(count, width))  # (count, D)
        return self.mlp(x.index_select(0, rows) + self.out(torch.cat(mixed)))  # (B, D)

    def mlp(self, x):
        h = self.fc(self.ln_2(x))  # (T, 4D)
        h = h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h)
        return x + self.proj(h)  # (T, D)


def run_blocks(tower, x, spans, rows, ends=None):
    """x (T, D) through all blocks -> the tokens at `rows` (B, D); `ends` as in Block.read."""
    causal = ends is not None
    for block in tower.blocks[:-1]:  # recompute: keep x only, the backward pass runs it again
        x = (checkpoint(block, x, spans, causal, use_reentrant=False) if tower.recompute
             else block(x, spans, causal))
    return tower.blocks[-1].read(x, spans, rows, ends)


class VisionTower(nn.Module):
    """Images (B, 3, S, S), normalised -> embeddings (B, E), not yet of unit length."""

    def __init__(self, config):
        super().__init__()
        self.config, self.patch_size, self.info = config, config.patch_size, {}
        self.recompute = False  # True: activation checkpointing
        width, layers, std = config.vision_width, config.vision_layers, config.vision_width ** -0.5
        tokens = 1 + (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        self.position_embedding = nn.Parameter(std * torch.randn(tokens, width))
        self.patch_embed = nn.Linear(3 * config.patch_size ** 2, width, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(width, layers, config.vision_heads, config.quick_gelu) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.projection = linear(width, config.embed_dim, std, bias=False)

    def forward(self, images):
        batch, patch = len(images), self.patch_size
        x = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, 3, S/P, P, S/P, P)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N-1, 3PP)
        x = self.patch_embed(x)  # (B, N-1, D)
        x = torch.cat([self.class_embedding.expand(batch, 1, -1), x], 1)  # (B, N, D)
        tokens = x.shape[1]
        x = self.ln_pre(x + self.position_embedding).flatten(0, 1)  # (B*N, D)
        rows = torch.arange(0, batch * tokens, tokens, device=x.device)  # class tokens
        x = run_blocks(self, x, ((batch, tokens),), rows)  # (B, D)
        return self.projection(self.ln_post(x))  # (B, E)


class TextTower(nn.Module):
    """Token ids (B, L) int64 -> embeddings (B, E), not yet of unit length.

    Causal, and read at the end token, the highest id: what is behind it is not computed.
    """

    def __init__(self, config):
        super().__init__()
        self.recompute = False
        width, layers = config.text_width, config.text_layers
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.position_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.blocks = nn.ModuleList(
            Block(width, layers, config.text_heads, config.quick_gelu) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.projection = linear(width, config.embed_dim, width ** -0.5, bias=False)

    def forward(self, tokens):
        x, spans, rows, ends, back = self.without_padding(tokens)
        x = run_blocks(self, x, spans, rows, ends).index_select(0, back)  # (B, D)
        return self.projection(self.ln_final(x))  # (B, E)

    def compile(self, **options):
        """Compiles the blocks in place, for any T; they share one graph, attention outside it."""
        for block in self.blocks:  # lengths change with every batch, graphs do not
            block.attention = torch.compiler.disable(attend)
            block.compile(dynamic=True, **options)

    def without_padding(self, tokens):
        """Sorts captions by length and cuts them into groups, each to its longest.

        tokens (B, L) -> x (T, D) embedded; spans of the groups; rows (B,) of x with the end
        tokens; ends (B,), their places in the captions; back (B,), which undoes the sorting.
        Lengths are read on the host: ids that lie there cost no wait for the device. The last i
        of K groups hold (i/K)^2 of the captions, for at the long end lengths differ most:
        captions of 17 tokens in the mean then cost about 20 each, not 77.
        """
        device, tokens = self.position_embedding.device, tokens.cpu()
        ends, order = tokens.argmax(1).sort()
        parts = [1 - (i / TEXT_GROUPS) ** 2 for i in range(TEXT_GROUPS + 1)]
        cuts = sorted({round(len(tokens) * part) for part in parts})  # fewer if the batch is small
        ids, rows, spans, total = [], [], [], 0
        for first, last in zip(cuts, cuts[1:]):
            count, length = last - first, int(ends[last - 1]) + 1
            ids.append(tokens[order[first:last], :length].flatten())  # (count * length,)
            rows.append(total + length * torch.arange(count) + ends[first:last])  # (count,)
            spans.append((count, length))
            total += count * length
        plan = [torch.cat(ids), torch.cat(rows), ends, order.argsort()]
        if device.type == "cuda":  # a copy from pinned memory does not stop the host
            plan = [tensor.pin_memory() for tensor in plan]
        ids, rows, ends, back = (tensor.to(device, non_blocking=True) for tensor in plan)
        places = torch.cat([self.position_embedding[:m].repeat(n, 1) for n, m in spans])  # (T, D)
        return self.token_embedding(ids) + places, tuple(spans), rows, ends, back


class CLIP(nn.Module):
    """Both towers and `logit_scale`, the log of the factor on the cosines (1 / temperature)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vocabulary, self.info = None, {}  # text of the .tiktoken file; origin of the weights
        self.text, self.vision = TextTower(config), VisionTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

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
    groups = [{"params": [], "names": [], "weight_decay": decay} for decay in (weight_decay, 0.0)]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = groups[parameter.ndim < 2 or name.endswith("position_embedding")]
            group["params"].append(parameter)
            group["names"].append(name)
    return groups


def flops_per_pair(config, text_tokens=None):
    """Floating point operations to train on a pair whose caption has `text_tokens` (None: all 77).

    A multiply-add is 2. A token costs a layer 6DD (qkv) + 2DD (out) + 16DD (MLP) + 4D * tokens
    (attention), a patch 6PPD, a projection 2DE; backward is twice forward. ViT-B-32: 3 * (8.82 +
    5.96) = 44.3 GFLOP. Nominal: padding, masked scores and all of the last blocks count.
    """
    def blocks(tokens, width, layers):
        return layers * tokens * (24 * width ** 2 + 4 * width * tokens)

    patches = (config.image_size // config.patch_size) ** 2
    vision = blocks(1 + patches, config.vision_width, config.vision_layers)
    text = blocks(text_tokens or config.context_length, config.text_width, config.text_layers)
    ends = 6 * patches * config.patch_size ** 2 * config.vision_width
    ends += 2 * (config.vision_width + config.text_width) * config.embed_dim
    return 3.0 * (vision + text + ends)


def peak_flops(device_name):
    """Dense bf16 FLOP/s by its maker's data sheet of a torch.cuda.get_device_name(), or None."""
    tera = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362,
            "L4": 121, "A10": 125, "RTX 4090": 165, "RTX 3090": 71, "MI300X": 1307}
    return next((1e12 * tera[n] for n in tera if re.search(rf"\b{n}\b", device_name)), None)


# ------------------------------------------ files ----------------------------------------------

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
        os.fsync(folder)
        os.close(folder)
    except RuntimeError as error:  # torch's zip writer hides the OSError that stopped it
        raise OSError(f"{path}: {error.__context__ or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def host_copy(value):
    """Tensors in nested dicts, lists and tuples, copied to the host: later steps leave them alone."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: host_copy(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(host_copy(entry) for entry in value)
    return value


def copy_weights(path, module):
    """Put the weights of a file into a CLIP or VisionTower of the same shape, every tensor.

    Returns the line that says so. ValueError if a size differs.
    """
    kind = "vision" if isinstance(module, VisionTower) else "clip"
    source = load(path, kind, None)
    for field, ours in asdict(module.config).items():
        theirs, of_text = getattr(source.config, field), field.startswith(("text", "vocab", "context"))
        if theirs != ours and (kind == "clip" or not of_text):
            raise ValueError(f"{path}: its {field} is {theirs}, this run's {ours}")
    module.load_state_dict(source.state_dict())
    return (f"{path}: {len(source.state_dict())} tensors, "
            f"checksum {weights_checksum(source.state_dict())}")


def read_file(path):
    """A file of torch.save as a dict, without running code from it; errors take one line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint or weights are expected")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        reason = f"it would run {code[1]}" if code else "not a weights file, or one with code"
        raise ValueError(f"{path}: refused, {reason}") from None
    except (RuntimeError, EOFError, LookupError, ValueError, AssertionError, TypeError,
            AttributeError, struct.error):  # each seen with random bytes changed
        raise ValueError(f"{path}: cut short, or not a weights file") from None
    return content if isinstance(content, dict) else {}


def read_checkpoint(path):
    """One of our checkpoints as a dict; one-line ValueError or FileNotFoundError otherwise."""
    content = read_file(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this project (no format={FORMAT!r} in it)")
    return content


def weights_checksum(weights):
    """16 hex digits: sha256 over names and bytes of a state dict, in the names' order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_clip(path, device="cpu", quick_gelu=None):
    """A CLIP in eval mode: our file, OpenAI's, open_clip's, or Hugging Face's file or folder.

    Names tell which it is, but not whether its GELU is the quick one: OpenAI's is, Hugging Face's
    config.json says, a bare open_clip file is not unless `quick_gelu` is True; the choice is
    printed. One-line ValueError or FileNotFoundError for anything else, naming the tensor.
    """
    return load(path, "clip", quick_gelu).to(device)


def load_vision(path, device="cpu"):
    """The vision tower, in eval mode, of a stage-1 checkpoint or of a CLIP; see load_clip."""
    return load(path, "vision", None).to(device)


def load(path, kind, quick_gelu):
    """The module in a weights file: all its tensors and no other, each in its shape."""
    from data import weights as foreign  # only to read and write files is this needed
    path = foreign.weights_file(path)
    content = foreign.read_archive(path) or read_file(path)
    stage_1 = content.get("kind") == "vision"
    if stage_1 and kind == "clip":
        raise ValueError(f"{path}: a vision tower alone (stage 1); a whole CLIP is needed here")
    if content.get("format") == FORMAT:
        layout, fields, weights = "ours", content["model"], content["weights"]
    else:
        layout, fields, weights = foreign.recognise(path, content, quick_gelu)
    with torch.device("meta"):  # shapes without memory or random draws
        module = (VisionTower if stage_1 else CLIP)(CLIPConfig(**fields))
    module.load_state_dict(foreign.to_ours(path, weights, module.state_dict(), layout), assign=True)
    if not stage_1:
        module.vocabulary = content.get("vocabulary")
        module = module if kind == "clip" else module.vision
    module.info = {"path": str(path), "sha256": foreign.sha256(path), "format": layout,
                   "step": content.get("step"), "samples": content.get("samples")}
    return module.eval()


def export_clip(clip, path, layout):
    """Writes a file for OpenAI's code ("openai") or open_clip, or a folder ("huggingface").

    The folder holds a tokenizer too if the model has CLIP's vocabulary. ValueError where the
    layout cannot say what the model is: heads that are not 64 wide, or GELU for OpenAI.
    """
    from data import weights as foreign
    weights = foreign.to_layout(clip.state_dict(), layout)
    if layout == "huggingface":
        foreign.write_folder(path, weights, asdict(clip.config), clip.vocabulary)
    else:
        write_checkpoint(path, weights | foreign.constants(asdict(clip.config), layout))
