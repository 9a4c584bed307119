"""CLIP weights as other people keep them: their files, their names for tensors, their folders.

model.load_clip is the way in, data/prepare/export.py the way out. OpenAI publishes TorchScript
archives; others publish files of torch.save, .safetensors, or folders of these with configs in
JSON. All are read as data: no code that a file may carry is run.
"""
import hashlib
import io
import json
import math
import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch

from data.images import MEAN, STD
from data.prepare.vocabulary import SPELLING
from data.text import read_ranks

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
# A folder's weights are in the first of these; of the configs beside weights the first two tell
# sizes and activation, and the first of these two that does is believed.
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors",
         "model.safetensors.index.json", "pytorch_model.bin")
CONFIGS = ("open_clip_config.json", "config.json",
           "preprocessor_config.json", "processor_config.json")
PIXELS = {"mean": MEAN, "image_mean": MEAN, "std": STD, "image_std": STD, "do_normalize": True}


# ---------------------------------------- reading -----------------------------------------

def weights_file(path):
    """The file itself, or the one in a folder of Hugging Face's or open_clip's hub."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path}: a folder without {' or '.join(FILES)}")


def read_file(path):
    """A weights file of any kind as a dict; FileNotFoundError or ValueError in one line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint or weights are expected")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".json":
        tensors = {}
        for file in shards(path):
            tensors |= read_safetensors(file)
        return tensors
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


def read_json(path):
    """The dict in a JSON file; {} if there is no such file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError):
        raise ValueError(f"{path}: not JSON, or not {{key: value}}") from None


def shards(index):
    """The .safetensors files that an index lists."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{index}: not an index of weights, it has no weight_map")
    return [index.parent / name for name in sorted(set(places.values()))]


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

    torch.jit.load would run its code, and torch.load refuses it by its constants.pkl. Without
    that it is as torch.save writes, and torch's safe reader opens it. Classes that exist in the
    archive only become `Node`; any other name is refused there.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(file, "w") as plain:
        for name in archive.namelist():
            if not name.endswith("/constants.pkl"):
                plain.writestr(name, archive.read(name))
    file.seek(0)
    classes = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    nodes = [(Node, name) for name in classes if name.startswith("__torch__.")]
    file.seek(0)
    with torch.serialization.safe_globals(nodes):
        todo = [("", torch.load(file, map_location="cpu", weights_only=True))]
    tensors = {}
    while todo:
        prefix, node = todo.pop()
        for name, value in vars(node).items():
            if isinstance(value, Node):
                todo.append((f"{prefix}{name}.", value))
            elif isinstance(value, torch.Tensor):
                tensors[prefix + name] = value
    return tensors


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
    told = told_beside(path, fields)
    if layout == "huggingface" and not told:
        raise FileNotFoundError(f"{path.parent / 'config.json'}: missing; it tells the heads")
    fields |= {"quick_gelu": quick_gelu} | told
    if layout == "openai":
        fields["quick_gelu"] = True
    if fields["quick_gelu"] is None:
        raise ValueError(f"{path}: nothing tells its activation; say --quick_gelu=true (OpenAI"
                         ", LAION-400M, MetaCLIP) or --quick_gelu=false, or put its "
                         "open_clip_config.json beside it")
    gelu = "quick-GELU" if fields["quick_gelu"] else "GELU"
    print(f"{path}: {layout} layout, {gelu}{notes}")
    weights = {name: tensor for name, tensor in tensors.items()
               if name not in CONSTANTS and not name.endswith(".position_ids")}
    return layout, fields, weights


def unwrap(path, content):
    """({name: tensor}, a note) of a foreign file: out of one nest, without one prefix.

    Training checkpoints keep the weights under a key. DistributedDataParallel, torch.compile
    and other wrappers put words before every name. ValueError if there are two of either.
    """
    nests = [key for key in NESTS if isinstance(content.get(key), dict)]
    if len(nests) > 1:
        raise ValueError(f"{path}: weights under {' and '.join(nests)}; keep one of them")
    content = content[nests[0]] if nests else content
    prefixes = []
    for layout in ("open_clip", "huggingface"):
        end = names("vision.class_embedding", layout)[0]
        for name in map(str, content):
            if name == end or name.endswith(f".{end}"):
                prefixes.append(name.removesuffix(end))
    if len(prefixes) > 1:
        raise ValueError(f"{path}: more than one CLIP, with "
                         f"{' and '.join(map(repr, prefixes))} before the names")
    note = f", under {nests[0]!r}" if nests else ""
    prefix = prefixes[0] if prefixes else ""
    note += f", names without {prefix!r}" if prefix else ""
    return {str(name).removeprefix(prefix): tensor for name, tensor in content.items()
            if isinstance(tensor, torch.Tensor)}, note


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


def told_beside(path, fields):
    """Fields that the configs beside a file tell; ValueError if they ask for other pixels."""
    told = {}
    for name in reversed(CONFIGS):  # the first that tells has the last word
        file = path.parent / name
        config = read_json(file)
        pixels = config.get("preprocess_cfg") or config.get("image_processor") or config
        for key, ours in PIXELS.items():
            theirs = pixels.get(key)
            if theirs is not None and not np.allclose(theirs, ours, atol=1e-4):
                raise ValueError(f"{file}: {key} is {theirs}, CLIP's {ours}; this project does "
                                 "not make the pixels of these weights")
        config = config.get("model_cfg", config)
        if "vision_cfg" in config or "quick_gelu" in config:
            vision, text = config.get("vision_cfg") or {}, config.get("text_cfg") or {}
            told = {"quick_gelu": bool(config.get("quick_gelu"))}
            if "head_width" in vision:
                told["vision_heads"] = fields["vision_width"] // vision["head_width"]
            if "heads" in text:
                told["text_heads"] = text["heads"]
        elif "vision_config" in config or config.get("model_type") == "clip":
            told = told_by_hugging_face(file, config)
    return told


def told_by_hugging_face(file, config):  # defaults as in transformers.CLIPConfig
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    activations = {part.get("hidden_act", "quick_gelu") for part in (vision, text)}
    if activations not in ({"gelu"}, {"quick_gelu"}):
        raise ValueError(f"{file}: hidden_act is {' and '.join(sorted(activations))}; "
                         "gelu or quick_gelu, in both towers")
    return {"vision_heads": vision.get("num_attention_heads", 12),
            "text_heads": text.get("num_attention_heads", 8),
            "quick_gelu": activations == {"quick_gelu"}}


# ------------------------------------ names and shapes ------------------------------------

def names(name, layout):
    """What a layout calls our tensor: one name, or three where it parts q, k and v."""
    for line in NAMES.strip().splitlines():
        row = line.split()
        name = name.replace(row[0], row[COLUMNS[layout]])
    if "?" in name:
        return [name.replace("?", letter) for letter in "qkv"]
    return [name]


def turned(name, layout):
    """Whether a tensor is turned: OpenAI's projections are (D, E), a linear layer's (E, D)."""
    return layout in ("openai", "open_clip") and name.endswith(".projection.weight")


def without_extra(weights):
    """Our state dict without what hangs in CLIP.extra."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith("extra.")}


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
    """Hex digest of a file, of an index its shards: evaluation's identity of the weights."""
    digest = hashlib.sha256()
    for part in shards(path) if path.suffix == ".json" else [path]:
        with open(part, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


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

    The way back from data/prepare/vocabulary.py, which says how bytes and words are spelled.
    """
    ranks = read_ranks(vocabulary, "vocabulary")

    def spell(token):
        word = token.removesuffix(b"\0") if len(token) > 1 else token  # NUL ends a word
        end = "</w>" if word != token else ""
        return word.decode("latin-1").translate(SPELLING) + end

    merges = ["#version: 0.2"]
    for token in sorted(ranks, key=ranks.get)[512:]:  # the first are single bytes
        left, right = halves(token, ranks)
        merges.append(f"{spell(left)} {spell(right)}")
    ids = {spell(token): rank for token, rank in ranks.items()}
    ids |= {"<|startoftext|>": len(ids), "<|endoftext|>": len(ids) + 1}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length}
    return {"vocab.json": ids, "merges.txt": "\n".join(merges) + "\n",
            "tokenizer_config.json": settings}  # special tokens: transformers' defaults


def halves(token, ranks):
    """The two tokens that the last merge of byte pair encoding joins to this one."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:  # as in encoding: of all neighbours, those of the lowest rank first
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
