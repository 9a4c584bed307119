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
import zipfile
from pathlib import Path

import torch

V, T = "vision_model.embeddings", "text_model.embeddings"  # to keep the table narrow
LAYOUTS = ("ours", "openai", "open_clip", "huggingface")
# Ours, OpenAI's and open_clip's, Hugging Face's. A "?" parts q, k and v; a row may be a part of a
# name, so that the last seven serve every block of both towers.
NAMES = [row.split() for row in f"""
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
""".strip().splitlines()]
CONSTANTS = {"input_resolution": "image_size", "context_length": "context_length",
             "vocab_size": "vocab_size"}  # in OpenAI's state dicts, and only there
# Files without a config do not tell the number of heads: each is 64 wide, with these exceptions.
HEAD_WIDTHS = {"vision": {1280: 80, 96: 32}, "text": {96: 32}}  # by width: ViT-H-14, our toy


# ----------------------------------------- reading ---------------------------------------------

def weights_file(path):
    """The file itself, or that of Hugging Face in a folder."""
    path = Path(path)
    found = [path / name for name in ("model.safetensors", "pytorch_model.bin")
             if (path / name).is_file()]
    if path.is_dir() and not found:
        raise FileNotFoundError(f"{path}: a folder without model.safetensors or pytorch_model.bin")
    return found[0] if found else path


def read_archive(path):
    """Tensors by name of a .safetensors file or a TorchScript archive; None if it is neither."""
    if path.suffix == ".safetensors" and path.is_file():
        try:
            import safetensors.torch
        except ImportError:
            raise ValueError(f"{path}: reading it takes `pip install safetensors`") from None
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a whole .safetensors file ({error})") from None
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/constants.pkl"):  # only TorchScript has it
                    return TorchScript(archive, path, name.removesuffix("constants.pkl")).tensors()
    except (zipfile.BadZipFile, pickle.UnpicklingError, OSError, RuntimeError, EOFError,
            LookupError, TypeError, AttributeError) as error:  # each seen with random bytes changed
        raise ValueError(f"{path}: a damaged TorchScript archive ({error})") from None
    return None


class Node:
    """Stands for an object of any class in a TorchScript archive: attributes, no code."""


class TorchScript(pickle.Unpickler):
    """Reads the tensors of a TorchScript archive and runs none of its code.

    Its data.pkl is a pickle of modules. Their classes become `Node`; tensors are rebuilt by the
    function below; of any other name that a pickle could call, nothing is looked up.
    """

    def __init__(self, archive, path, folder):
        super().__init__(io.BytesIO(archive.read(folder + "data.pkl")))
        self.archive, self.path, self.folder = archive, path, folder

    def find_class(self, module, name):
        if module.startswith("__torch__."):
            return Node
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda data, offset, size, stride, *_: data.as_strided(size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):  # of a tensor's hooks: always empty
            return dict
        dtypes = {"FloatStorage": torch.float32, "HalfStorage": torch.float16,
                  "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64}
        if module == "torch" and name in dtypes:
            return dtypes[name]
        raise ValueError(f"{self.path}: refused, reading it would run {module}.{name}")

    def persistent_load(self, key):
        _, dtype, name, *_ = key  # ("storage", type, file, device, number of elements)
        data = bytearray(self.archive.read(f"{self.folder}data/{name}"))
        return torch.frombuffer(data, dtype=dtype)

    def tensors(self):
        """{dotted name: tensor} of the whole tree of modules."""
        found, todo = {}, [("", self.load())]
        while todo:
            prefix, node = todo.pop()
            for name, value in vars(node).items():
                if isinstance(value, Node):
                    todo.append((f"{prefix}{name}.", value))
                elif isinstance(value, torch.Tensor):
                    found[prefix + name] = value
        return found


def recognise(path, content, quick_gelu):
    """(layout, fields of a CLIPConfig, tensors by name) of a foreign file; prints what it is."""
    content = content.get("state_dict", content)  # open_clip's training checkpoints have more
    # "module." is what DistributedDataParallel puts before every name
    tensors = {str(name).removeprefix("module."): tensor for name, tensor in content.items()
               if isinstance(tensor, torch.Tensor)}
    layout = ("huggingface" if names("vision.class_embedding", "huggingface")[0] in tensors else
              "openai" if {"visual.proj", *CONSTANTS} <= {*tensors} else "open_clip")
    try:  # whether the other tensors are there as well, to_ours sees
        fields = shapes(tensors, layout)
    except KeyError as missing:
        raise ValueError(f"{path}: no CLIP with a vision transformer in the layout of OpenAI, "
                         f"open_clip or Hugging Face: tensor {missing} is missing") from None
    if layout == "huggingface":
        heads_and_gelu(path, fields)
    else:
        fields["quick_gelu"] = layout == "openai" or bool(quick_gelu)
    tensors = {name: tensor for name, tensor in tensors.items()
               if name not in CONSTANTS and not name.endswith(".position_ids")}  # no weights
    print(f"{path}: {layout} layout, {'quick-GELU' if fields['quick_gelu'] else 'GELU'}"
          + (" (unless quick_gelu=True)" if layout == "open_clip" and not quick_gelu else ""))
    return layout, fields, tensors


def shapes(tensors, layout):
    """Fields of a CLIPConfig as the tensors' shapes tell them; KeyError if one is missing."""
    def shape(name):
        return tensors[names(name, layout)[0]].shape

    def layers(tower):
        first = re.escape(names(f"{tower}.blocks.", layout)[0])
        found = [re.match(first + r"(\d+)\.", name) for name in tensors]
        return 1 + max((int(match[1]) for match in found if match), default=0)

    vision_width, _, _, patch_size = shape("vision.patch_embed.weight")
    grid = math.isqrt(shape("vision.position_embedding")[0] - 1)
    context_length, text_width = shape("text.position_embedding")
    return {
        "embed_dim": tensors[names("text.projection.weight", layout)[0]].numel() // text_width,
        "image_size": grid * patch_size, "patch_size": patch_size,
        "vision_width": vision_width, "vision_layers": layers("vision"),
        "vision_heads": heads(vision_width, "vision"), "context_length": context_length,
        "vocab_size": shape("text.token_embedding.weight")[0],
        "text_width": text_width, "text_layers": layers("text"),
        "text_heads": heads(text_width, "text")}


def heads(width, tower):
    """Number of heads of a tower whose file does not tell."""
    return width // HEAD_WIDTHS[tower].get(width, 64)


def heads_and_gelu(path, fields):
    """Completes `fields` from the config.json beside a Hugging Face file."""
    file = path.parent / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; heads and activation of {path.name} stand in it")
    config = json.loads(file.read_text())
    for tower, default in (("vision", 12), ("text", 8)):  # defaults as in transformers.CLIPConfig
        part = config.get(f"{tower}_config") or {}
        fields[f"{tower}_heads"] = part.get("num_attention_heads", default)
        act = part.get("hidden_act", "quick_gelu")
        if act not in ("gelu", "quick_gelu") or fields.setdefault("quick_gelu", act[0] == "q") != (
                act[0] == "q"):
            raise ValueError(f"{file}: hidden_act={act!r}; gelu or quick_gelu, in both towers")


# ------------------------------------- names and shapes ----------------------------------------

def names(name, layout):
    """What a layout calls our tensor: one name, or three where it parts q, k and v."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: openai, open_clip or huggingface")
    column = {"ours": 0, "huggingface": 2}.get(layout, 1)
    for row in NAMES:
        name = name.replace(row[0], row[column])
    return [name.replace("?", letter) for letter in "qkv"] if "?" in name else [name]


def turned(name, layout):
    """OpenAI stores the projections to the common space as (D, E), a linear layer has (E, D)."""
    return layout in ("openai", "open_clip") and name.endswith(".projection.weight")


def to_layout(weights, layout):
    """Our state dict -> theirs, of contiguous copies (safetensors takes no shared memory)."""
    theirs = {}
    for name, tensor in weights.items():
        called = names(name, layout)
        if turned(name, layout):
            tensor = tensor.t()
        if name == "vision.patch_embed.weight" and layout != "ours":
            side = math.isqrt(tensor.shape[1] // 3)
            tensor = tensor.unflatten(1, (3, side, side))  # (D, 3, P, P), a convolution's
        for part_name, part in zip(called, tensor.chunk(len(called)) if called[1:] else [tensor]):
            theirs[part_name] = part.clone(memory_format=torch.contiguous_format)
    return theirs


def to_ours(path, theirs, empty, layout):
    """Their state dict -> ours in fp32, if it has the names and shapes of `empty`, ours."""
    wanted = to_layout(empty, layout)  # on the meta device: names and shapes
    for name in [*wanted, *theirs]:
        if name not in theirs:
            raise ValueError(f"{path}: tensor {name} is missing")
        if name not in wanted:
            raise ValueError(f"{path}: tensor {name} is none of this model's")
        if theirs[name].shape != wanted[name].shape:
            raise ValueError(f"{path}: tensor {name} is {tuple(theirs[name].shape)}, "
                             f"not {tuple(wanted[name].shape)}")
    ours = {}
    for name, like in empty.items():
        parts = [theirs[called].float() for called in names(name, layout)]
        tensor = torch.cat(parts) if parts[1:] else parts[0]
        tensor = tensor.t() if turned(name, layout) else tensor
        ours[name] = tensor.reshape(like.shape).contiguous()
    return ours


def sha256(path):
    """Hex digest of a file: evaluation writes it down as the weights' identity."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------- writing ---------------------------------------------

def constants(config, layout):
    """What an OpenAI file holds besides weights; ValueError if the layout cannot hold the model."""
    for tower in ("vision", "text"):
        width, count = config[f"{tower}_width"], config[f"{tower}_heads"]
        if count != heads(width, tower):
            raise ValueError(f"layout={layout!r} does not store heads: {count} for width {width} "
                             f"would be read as {heads(width, tower)}; use huggingface")
    if layout == "openai" and not config["quick_gelu"]:
        raise ValueError("layout='openai' means quick-GELU, this model has GELU; use open_clip")
    return {name: torch.tensor(config[field]) for name, field in CONSTANTS.items()
            if layout == "openai"}


def write_folder(path, tensors, config, vocabulary):
    """What transformers.CLIPModel and CLIPTokenizer.from_pretrained open."""
    from data.images import MEAN, STD
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("layout='huggingface' takes `pip install safetensors`") from None
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    end, size = config["vocab_size"] - 1, config["image_size"]
    towers = {f"{tower}_config": {
        "hidden_size": config[f"{tower}_width"], "intermediate_size": 4 * config[f"{tower}_width"],
        "num_hidden_layers": config[f"{tower}_layers"],
        "num_attention_heads": config[f"{tower}_heads"], "projection_dim": config["embed_dim"],
        "hidden_act": "quick_gelu" if config["quick_gelu"] else "gelu"}
        for tower in ("vision", "text")}
    towers["vision_config"] |= {"image_size": size, "patch_size": config["patch_size"]}
    towers["text_config"] |= {
        "max_position_embeddings": config["context_length"], "vocab_size": config["vocab_size"],
        "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    files = {
        "config.json": {"architectures": ["CLIPModel"], "model_type": "clip",
                        "projection_dim": config["embed_dim"], **towers},
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size}, "do_resize": True, "resample": 3,
            "do_center_crop": True, "do_normalize": True, "image_mean": MEAN, "image_std": STD}}
    if vocabulary is not None and config["vocab_size"] == 49408:
        files |= tokenizer_files(vocabulary, config["context_length"])
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (path / name).write_text(text, encoding="utf-8")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def tokenizer_files(vocabulary, context_length):
    """{file name: content} of Hugging Face's CLIPTokenizer for the text of a .tiktoken file.

    There each byte is spelled as a printable character (GPT-2's table: the printable ones of
    Latin-1 stand for themselves, the others follow from U+0100 on) and a word ends with "</w>".
    """
    # data/prepare/vocabulary.py goes the other way; tests compare its input with this output
    ranks = {base64.b64decode(token): int(rank)
             for token, rank in (line.split() for line in vocabulary.splitlines())}
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    spelled = {byte: chr(byte) for byte in plain} | {b: chr(256 + i) for i, b in enumerate(others)}

    def spell(token):
        ends = len(token) > 1 and token.endswith(b"\0")
        return "".join(spelled[b] for b in token[:-1 if ends else None]) + ("</w>" if ends else "")

    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    ids = {spell(token): rank for token, rank in ranks.items()}
    merges = [" ".join(map(spell, halves(token, ranks)))
              for token, rank in sorted(ranks.items(), key=lambda item: item[1]) if rank >= 512]
    return {"vocab.json": json.dumps(ids | {start: len(ids), end: len(ids) + 1}) + "\n",
            "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
            "special_tokens_map.json": special,
            "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", **special,
                                      "do_lower_case": True, "model_max_length": context_length}}


def halves(token, ranks):
    """The two tokens that the last merge of byte pair encoding joins to this one."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:  # as in encoding: of all neighbours, those of the lowest rank first
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
