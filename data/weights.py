"""CLIP weights as other people keep them: their files, their names for tensors, their folders.

model.load_clip and model.export_clip are the way in. OpenAI publishes TorchScript archives,
open_clip and others files of torch.save, Hugging Face folders with .safetensors or .bin and a
config.json. All are read as data: no code that a file may carry is run.
"""
import base64
import hashlib
import io
import json
import math
import pickle
import re
import struct
import zipfile
from pathlib import Path

import torch

COLUMNS = {"ours": 0, "openai": 1, "open_clip": 1, "huggingface": 2}  # of NAMES
V, T = "vision_model.embeddings", "text_model.embeddings"  # to keep the table narrow
# Names of tensors: ours, OpenAI's and open_clip's, Hugging Face's. A row is a whole name or a
# part of it: the last seven serve every block of both towers. A "?" stands for q, k and v.
NAMES = f"""
vision.class_embedding    visual.class_embedding        {V}.class_embedding
vision.position_embedding visual.positional_embedding   {V}.position_embedding.weight
vision.patch_embed.       visual.conv1.                 {V}.patch_embedding.
vision.ln_pre.            visual.ln_pre.                vision_model.pre_layrnorm.
vision.blocks.            visual.transformer.resblocks. vision_model.encoder.layers.
vision.ln_post.           visual.ln_post.               vision_model.post_layernorm.
vision.projection.weight  visual.proj                   visual_projection.weight
text.token_embedding.     token_embedding.              {T}.token_embedding.
text.position_embedding   positional_embedding          {T}.position_embedding.weight
text.blocks.              transformer.resblocks.        text_model.encoder.layers.
text.ln_final.            ln_final.                     text_model.final_layer_norm.
text.projection.weight    text_projection               text_projection.weight
.ln_1.                    .ln_1.                        .layer_norm1.
.ln_2.                    .ln_2.                        .layer_norm2.
.qkv.weight               .attn.in_proj_weight          .self_attn.?_proj.weight
.qkv.bias                 .attn.in_proj_bias            .self_attn.?_proj.bias
.out.                     .attn.out_proj.               .self_attn.out_proj.
.fc.                      .mlp.c_fc.                    .mlp.fc1.
.proj.                    .mlp.c_proj.                  .mlp.fc2.
"""
CONSTANTS = {"input_resolution": "image_size", "context_length": "context_length",
             "vocab_size": "vocab_size"}  # in OpenAI's state dicts, and only there
# Files without a config do not tell the number of heads. Each is 64 wide, but for these:
HEAD_WIDTHS = {"vision": {1280: 80, 96: 32}, "text": {96: 32}}  # by width: ViT-H-14, our toy
NESTS = ("state_dict", "model_state_dict", "model")  # keys of weights in training checkpoints


# ---------------------------------------- reading -----------------------------------------

def weights_file(path):
    """The file itself, or that of Hugging Face in a folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path}: a folder without model.safetensors or pytorch_model.bin")


def read_file(path):
    """A weights file of any kind as a dict; no code that it may carry is run.

    FileNotFoundError or ValueError, in one line, if it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint or weights are expected")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        if is_torchscript(path):
            return read_torchscript(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        reason = f"it would run {code[1]}" if code else "not a weights file, or one with code"
        raise ValueError(f"{path}: refused, {reason}") from None
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, AssertionError, TypeError,
            AttributeError, struct.error, zipfile.BadZipFile):  # seen with random bytes changed
        raise ValueError(f"{path}: cut short, or not a weights file") from None
    return content if isinstance(content, dict) else {}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError(f"{path}: reading it takes `pip install safetensors`") from None
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole .safetensors file ({error})") from None


def is_torchscript(path):
    """Whether a file is a TorchScript archive: only they have a constants.pkl."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class Node:
    """Stands for a module of any class in a TorchScript archive: attributes, no code."""


def read_torchscript(path):
    """{dotted name: tensor} of the whole tree of modules in a TorchScript archive.

    torch.jit.load would run its code, and torch.load refuses it by its constants.pkl. What is
    left without that is what torch.save would have written, and torch's safe reader opens it.
    Classes that exist in the archive only become `Node`; any other name is refused there.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(file, "w") as plain:
        for name in archive.namelist():
            if not name.endswith("/constants.pkl"):
                plain.writestr(name, archive.read(name))
    file.seek(0)
    classes = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(file):
        if name.startswith("__torch__."):
            classes.append((Node, name))
    file.seek(0)
    with torch.serialization.safe_globals(classes):
        root = torch.load(file, map_location="cpu", weights_only=True)

    tensors, todo = {}, [("", root)]
    while todo:
        prefix, node = todo.pop()
        for name, value in vars(node).items():
            if isinstance(value, Node):
                todo.append((f"{prefix}{name}.", value))
            elif isinstance(value, torch.Tensor):
                tensors[prefix + name] = value
    return tensors


# ----------------------------- whose weights, and their sizes -----------------------------

def recognise(path, content, quick_gelu):
    """(layout, fields of a CLIPConfig, {name: tensor}) of a foreign file; prints what it is."""
    tensors, notes = unwrap(path, content)
    layout = "open_clip"
    if names("vision.class_embedding", "huggingface")[0] in tensors:
        layout = "huggingface"
    elif {"visual.proj", *CONSTANTS} <= tensors.keys():
        layout = "openai"
    try:  # whether the other tensors are there as well, to_ours sees
        fields = sizes(tensors, layout)
    except KeyError as missing:
        raise ValueError(f"{path}: no CLIP with a vision transformer in the layout of OpenAI, "
                         f"open_clip or Hugging Face: tensor {missing} is missing") from None
    if layout == "huggingface":
        fields |= heads_and_gelu(path)
    else:
        fields["quick_gelu"] = layout == "openai" or bool(quick_gelu)
    gelu = "quick-GELU" if fields["quick_gelu"] else "GELU"
    if layout == "open_clip" and not quick_gelu:
        gelu += " (unless quick_gelu=True)"
    print(f"{path}: {layout} layout, {gelu}{notes}")
    for name in list(tensors):
        if name in CONSTANTS or name.endswith(".position_ids"):  # these are no weights
            del tensors[name]
    return layout, fields, tensors


def unwrap(path, content):
    """({name: tensor}, a note) of a foreign file: out of one nest, without one prefix.

    Training checkpoints keep the weights under a key. DistributedDataParallel, torch.compile
    and other wrappers put words before every name. ValueError if there are two of either.
    """
    note = ""
    nests = [key for key in NESTS if isinstance(content.get(key), dict)]
    if len(nests) > 1:
        raise ValueError(f"{path}: weights under {' and '.join(nests)}; keep one of them")
    if nests:
        content = content[nests[0]]
        note += f", under {nests[0]!r}"
    found = []
    for layout in ("open_clip", "huggingface"):
        end = names("vision.class_embedding", layout)[0]
        for name in map(str, content):
            if name == end or name.endswith(f".{end}"):
                found.append(name.removesuffix(end))
    if len(found) > 1:
        raise ValueError(f"{path}: more than one CLIP, with "
                         f"{' and '.join(map(repr, found))} before the names")
    prefix = found[0] if found else ""
    if prefix:
        note += f", names without {prefix!r}"
    tensors = {}
    for name, tensor in content.items():
        if isinstance(tensor, torch.Tensor):
            tensors[str(name).removeprefix(prefix)] = tensor
    return tensors, note


def sizes(tensors, layout):
    """Fields of a CLIPConfig as the tensors' shapes tell them; KeyError if one is missing."""
    def shape(name):
        return tensors[names(name, layout)[0]].shape

    def layers(tower):
        first = names(f"{tower}.blocks.", layout)[0]
        return len({name.removeprefix(first).split(".")[0] for name in tensors
                    if name.startswith(first)})

    vision_width, _, _, patch_size = shape("vision.patch_embed.weight")
    grid = math.isqrt(shape("vision.position_embedding")[0] - 1)
    context_length, text_width = shape("text.position_embedding")
    return {
        "embed_dim": shape("text.projection.weight").numel() // text_width,
        "image_size": grid * patch_size, "patch_size": patch_size,
        "vision_width": vision_width, "vision_layers": layers("vision"),
        "vision_heads": heads(vision_width, "vision"), "context_length": context_length,
        "vocab_size": shape("text.token_embedding.weight")[0],
        "text_width": text_width, "text_layers": layers("text"),
        "text_heads": heads(text_width, "text")}


def heads(width, tower):
    """Number of heads of a tower whose file does not tell."""
    return width // HEAD_WIDTHS[tower].get(width, 64)


def heads_and_gelu(path):
    """The fields that stand in the config.json beside a Hugging Face file only."""
    file = path.parent / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; it tells the heads of {path.name}")
    config = json.loads(file.read_text())
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    activations = set()  # defaults as in transformers.CLIPConfig
    for part in (vision, text):
        activations.add(part.get("hidden_act", "quick_gelu"))
    if activations not in ({"gelu"}, {"quick_gelu"}):
        raise ValueError(f"{file}: hidden_act is {' and '.join(sorted(activations))}; "
                         "gelu or quick_gelu, in both towers")
    return {"vision_heads": vision.get("num_attention_heads", 12),
            "text_heads": text.get("num_attention_heads", 8),
            "quick_gelu": activations == {"quick_gelu"}}


# ------------------------------------ names and shapes ------------------------------------

def names(name, layout):
    """What a layout calls our tensor: one name, or three where it parts q, k and v."""
    if layout not in COLUMNS:
        raise ValueError(f"layout={layout!r}: openai, open_clip or huggingface")
    for line in NAMES.strip().splitlines():
        row = line.split()
        name = name.replace(row[0], row[COLUMNS[layout]])
    if "?" in name:
        return [name.replace("?", letter) for letter in "qkv"]
    return [name]


def turned(name, layout):
    """Whether a tensor is turned: OpenAI's projections are (D, E), a linear layer's (E, D)."""
    return layout in ("openai", "open_clip") and name.endswith(".projection.weight")


def to_layout(weights, layout):
    """Our state dict -> theirs, of contiguous copies (safetensors takes no shared memory)."""
    theirs = {}
    for name, tensor in weights.items():
        if turned(name, layout):
            tensor = tensor.t()
        if name == "vision.patch_embed.weight" and layout != "ours":
            side = math.isqrt(tensor.shape[1] // 3)
            tensor = tensor.unflatten(1, (3, side, side))  # (D, 3, P, P), a convolution's
        called = names(name, layout)
        parts = tensor.chunk(3) if len(called) == 3 else [tensor]
        for part_name, part in zip(called, parts):
            theirs[part_name] = part.clone(memory_format=torch.contiguous_format)
    return theirs


def to_ours(path, theirs, empty, layout):
    """Their state dict -> ours in fp32, if it has the names and shapes of `empty`, ours."""
    wanted = to_layout(empty, layout)  # on the meta device: names and shapes
    for name in wanted.keys() - theirs.keys():
        raise ValueError(f"{path}: tensor {name} is missing")
    for name in theirs.keys() - wanted.keys():
        raise ValueError(f"{path}: tensor {name} is none of this model's")
    for name in wanted:
        found, due = tuple(theirs[name].shape), tuple(wanted[name].shape)
        if found != due:
            raise ValueError(f"{path}: tensor {name} is {found}, not {due}")
    ours = {}
    for name, like in empty.items():
        parts = [theirs[called].float() for called in names(name, layout)]
        tensor = torch.cat(parts) if len(parts) == 3 else parts[0]
        if turned(name, layout):
            tensor = tensor.t()
        ours[name] = tensor.reshape(like.shape).contiguous()
    return ours


def sha256(path):
    """Hex digest of a file: evaluation writes it down as the weights' identity."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------- writing -----------------------------------------

def constants(config, layout):
    """What an OpenAI file holds besides weights; ValueError if the layout cannot hold it."""
    for tower in ("vision", "text"):
        width, count = config[f"{tower}_width"], config[f"{tower}_heads"]
        if count != heads(width, tower):
            raise ValueError(f"layout={layout!r} does not store heads: {count} for width "
                             f"{width} would be read as {heads(width, tower)}; use huggingface")
    if layout != "openai":
        return {}
    if not config["quick_gelu"]:
        raise ValueError("layout='openai' means quick-GELU, this model has GELU; use open_clip")
    return {name: torch.tensor(config[field]) for name, field in CONSTANTS.items()}


def write_folder(path, tensors, config, vocabulary):
    """What transformers.CLIPModel and CLIPTokenizer.from_pretrained open."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("layout='huggingface' takes `pip install safetensors`") from None
    files = config_files(config)
    if vocabulary is not None and config["vocab_size"] == 49408:
        files |= tokenizer_files(vocabulary, config["context_length"])
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (path / name).write_text(text, encoding="utf-8")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def config_files(config):
    """{file name: content} of Hugging Face's CLIPConfig and CLIPImageProcessor."""
    from data.images import MEAN, STD
    end, size = config["vocab_size"] - 1, config["image_size"]
    towers = {}
    for tower in ("vision", "text"):
        towers[f"{tower}_config"] = {
            "hidden_size": config[f"{tower}_width"],
            "intermediate_size": 4 * config[f"{tower}_width"],
            "num_hidden_layers": config[f"{tower}_layers"],
            "num_attention_heads": config[f"{tower}_heads"],
            "projection_dim": config["embed_dim"],
            "hidden_act": "quick_gelu" if config["quick_gelu"] else "gelu"}
    towers["vision_config"] |= {"image_size": size, "patch_size": config["patch_size"]}
    towers["text_config"] |= {
        "max_position_embeddings": config["context_length"], "vocab_size": config["vocab_size"],
        "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    return {
        "config.json": {"architectures": ["CLIPModel"], "model_type": "clip",
                        "projection_dim": config["embed_dim"], **towers},
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size}, "do_resize": True, "resample": 3,
            "do_center_crop": True, "do_normalize": True, "image_mean": MEAN, "image_std": STD}}


def tokenizer_files(vocabulary, context_length):
    """{file name: content} of Hugging Face's CLIPTokenizer for the text of a .tiktoken file.

    There each byte is spelled as a printable character (GPT-2's table: the printable ones of
    Latin-1 stand for themselves, the others follow from U+0100 on) and a word ends with "</w>".
    """
    # data/prepare/vocabulary.py goes the other way; tests compare its input with this output
    spelled = {}
    for byte in range(256):
        if 33 <= byte < 127 or 161 <= byte < 173 or 174 <= byte:
            spelled[byte] = chr(byte)
    others = [byte for byte in range(256) if byte not in spelled]
    for number, byte in enumerate(others):
        spelled[byte] = chr(256 + number)

    def spell(token):
        word = token.removesuffix(b"\0") if len(token) > 1 else token  # NUL ends a word
        end = "</w>" if word != token else ""
        return "".join(spelled[byte] for byte in word) + end

    ranks = {}
    for line in vocabulary.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    merges = ["#version: 0.2"]
    for token in sorted(ranks, key=ranks.get)[512:]:  # the first are single bytes
        left, right = halves(token, ranks)
        merges.append(f"{spell(left)} {spell(right)}")
    start, end = "<|startoftext|>", "<|endoftext|>"
    ids = {spell(token): rank for token, rank in ranks.items()}
    ids |= {start: len(ids), end: len(ids) + 1}
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    settings = {"tokenizer_class": "CLIPTokenizer", **special, "do_lower_case": True,
                "model_max_length": context_length}
    return {"vocab.json": json.dumps(ids) + "\n", "merges.txt": "\n".join(merges) + "\n",
            "special_tokens_map.json": special, "tokenizer_config.json": settings}


def halves(token, ranks):
    """The two tokens that the last merge of byte pair encoding joins to this one."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:  # as in encoding: of all neighbours, those of the lowest rank first
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
