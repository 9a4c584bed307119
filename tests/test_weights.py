"""Weights travel to OpenAI's, open_clip's and Hugging Face's layouts and back without a bit's loss,
and whatever is not a CLIP is refused in one line."""
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from configs import load_config
from data import weights as foreign
from data.images import MEAN, STD
from data.prepare.export import export_clip
from model import (CLIP, FORMAT, SIZES, CLIPConfig, VisionTower, copy_weights,
                   load_clip, load_vision, read_checkpoint, weights_checksum, write_checkpoint)

SMALL = CLIPConfig(embed_dim=24, image_size=32, patch_size=8, vision_width=128, vision_layers=2,
                   vision_heads=2, context_length=12, vocab_size=50, text_width=64, text_layers=3,
                   text_heads=1)  # heads are 64 wide, as bare layouts suppose
QUICK = replace(SMALL, quick_gelu=True)


def make_clip(config=SMALL):
    torch.manual_seed(0)
    clip = CLIP(config).eval()
    for parameter in clip.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return clip


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save_ours(path, clip, **fields):
    write_checkpoint(path, {"format": FORMAT, "kind": "clip", "model": asdict(clip.config),
                            "weights": clip.state_dict(), "step": 7, "samples": 70,
                            "vocabulary": "words\n"} | fields)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# -------------------------------------------------------------------------------------- round trips

def test_our_checkpoint_returns_bit_equal_with_its_origin(tmp_path):
    clip, path = make_clip(QUICK), tmp_path / "ckpt.pt"
    save_ours(path, clip)
    loaded = load_clip(path)
    assert same_bits(clip, loaded) and loaded.config == QUICK and loaded.vocabulary == "words\n"
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert loaded.info == {"path": str(path), "sha256": foreign.sha256(path), "format": "ours",
                           "step": 7, "samples": 70, "config": {}}


@pytest.mark.parametrize("layout, config", [
    ("openai", QUICK), ("open_clip", SMALL), ("huggingface", SMALL), ("huggingface", QUICK),
    ("huggingface", replace(SMALL, vision_heads=4, text_heads=2)),
    ("open_clip", replace(SIZES["toy"], vocab_size=60))])
def test_each_layout_returns_bit_equal(layout, config, tmp_path):
    if layout == "huggingface":
        pytest.importorskip("safetensors", reason="pip install safetensors")
    clip = make_clip(config)
    export_clip(clip, tmp_path / "exported", layout)
    bare = layout == "open_clip"
    loaded = load_clip(tmp_path / "exported", quick_gelu=config.quick_gelu if bare else None)
    assert same_bits(clip, loaded) and loaded.config == config
    assert loaded.info["format"] == layout


@pytest.mark.parametrize("layout", ["open_clip", "huggingface"])
@pytest.mark.parametrize("nest, prefix", [
    ("state_dict", "module."), ("state_dict", ""), ("", "module."), ("model", ""),
    ("model_state_dict", "module._orig_mod."), ("state_dict", "model."), ("", "_orig_mod."),
    ("", "clip_model."), ("", "")])
def test_one_nest_and_one_prefix_are_read_and_said(nest, prefix, layout, tmp_path, capsys):
    clip = make_clip()
    if layout == "huggingface":
        pytest.importorskip("safetensors", reason="pip install safetensors")
        export_clip(clip, tmp_path, layout)  # the config.json
    weights = foreign.to_layout(clip.state_dict(), layout)
    weights = {prefix + name: tensor for name, tensor in weights.items()}
    torch.save({"epoch": 3, nest: weights} if nest else weights, tmp_path / "epoch_3.pt")
    assert same_bits(clip, load_clip(tmp_path / "epoch_3.pt", quick_gelu=False))
    said, = capsys.readouterr().out.splitlines()
    assert (f"under '{nest}'" in said) == bool(nest)
    assert (f"names without '{prefix}'" in said) == bool(prefix)


def test_several_nests_or_prefixes_are_refused_by_name(tmp_path):
    weights, path = foreign.to_layout(make_clip().state_dict(), "open_clip"), tmp_path / "two.pt"
    torch.save({"model": weights, "state_dict": weights}, path)
    with pytest.raises(ValueError, match="state_dict and model") as error:
        load_clip(path)
    one_line(error)
    torch.save({prefix + name: tensor for name, tensor in weights.items()
                for prefix in ("student.", "teacher.")}, path)
    with pytest.raises(ValueError, match="'student.' and 'teacher.'") as error:
        load_clip(path)
    one_line(error)


def test_what_hangs_in_extra_is_not_exported(tmp_path):
    clip = make_clip()
    export_clip(clip, tmp_path / "plain.pt", "open_clip")
    clip.extra.bias = nn.Parameter(torch.zeros(()))
    export_clip(clip, tmp_path / "extra.pt", "open_clip")
    assert torch.load(tmp_path / "plain.pt").keys() == torch.load(tmp_path / "extra.pt").keys()


# ------------------------------------------------------------ activation, configs, pixels, folders

def bare(folder, clip=None):
    """A state dict in open_clip's names: nothing in it tells its activation."""
    export_clip(clip or make_clip(), folder / "bare.pt", "open_clip")
    return folder / "bare.pt"


def write_json(path, content):
    path.write_text(json.dumps(content))


def hub_config(quick=True, **preprocess):
    """A config as open_clip's hub has it, for SMALL."""
    vision = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8}
    text = {"context_length": 12, "vocab_size": 50, "width": 64, "heads": 1, "layers": 3}
    model = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    if quick:  # open_clip leaves it away where it is false
        model["quick_gelu"] = True
    return {"model_cfg": model, "preprocess_cfg": preprocess}


@pytest.mark.parametrize("read", [load_clip, load_vision, "copy to clip", "copy to vision"])
def test_a_bare_file_is_refused_until_its_activation_is_said(read, tmp_path, capsys):
    path = bare(tmp_path)
    if isinstance(read, str):
        target = make_clip(QUICK) if read == "copy to clip" else make_clip(QUICK).vision

        def read(path, quick_gelu=None):
            copy_weights(path, target, quick_gelu)
            return target
    with pytest.raises(ValueError, match=r"bare.pt: nothing tells its activation; say "
                       "--quick_gelu=true") as error:
        read(path)
    one_line(error)
    assert read(path, quick_gelu=True).config.quick_gelu
    assert "quick-GELU" in capsys.readouterr().out


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name, form", [
    ("open_clip_config.json", "hub"), ("config.json", "hub"), ("config.json", "model"),
    ("config.json", "huggingface")])
def test_a_config_beside_a_bare_file_tells_its_activation(name, form, quick, tmp_path):
    clip = make_clip(replace(SMALL, quick_gelu=quick))
    config = hub_config(quick)
    if form == "model":
        config = config["model_cfg"]
    elif form == "huggingface":
        config = foreign.config_files(asdict(clip.config))["config.json"]
    write_json(tmp_path / name, config)
    loaded = load_clip(bare(tmp_path, clip))
    assert same_bits(clip, loaded) and loaded.config == clip.config
    assert load_clip(tmp_path / "bare.pt", quick_gelu=not quick).config.quick_gelu == quick


def test_a_config_that_says_nothing_of_clip_decides_nothing(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "bert", "lr": 1e-3})
    with pytest.raises(ValueError, match="nothing tells its activation"):
        load_clip(bare(tmp_path))


def test_heads_are_as_open_clips_config_says(tmp_path):
    config = hub_config()
    config["model_cfg"]["vision_cfg"]["head_width"] = 32
    config["model_cfg"]["text_cfg"]["heads"] = 4
    write_json(tmp_path / "open_clip_config.json", config)
    loaded = load_clip(bare(tmp_path))
    assert loaded.config == replace(QUICK, vision_heads=4, text_heads=4)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_config_that_is_no_json_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: not JSON") as error:
        load_clip(bare(tmp_path))
    one_line(error)


@pytest.mark.parametrize("file, section, key, value", [
    ("open_clip_config.json", "preprocess_cfg", "mean", [0.5, 0.5, 0.5]),
    ("open_clip_config.json", "preprocess_cfg", "mean", [0.485, 0.456, 0.406]),
    ("open_clip_config.json", "preprocess_cfg", "std", 0.5),
    ("preprocessor_config.json", "", "image_mean", [0.485, 0.456, 0.406]),
    ("preprocessor_config.json", "", "image_std", [0.229, 0.224, 0.225]),
    ("preprocessor_config.json", "", "do_normalize", False),
    ("processor_config.json", "image_processor", "image_std", [0.5, 0.5, 0.5])])
def test_weights_for_other_pixels_are_refused(file, section, key, value, tmp_path):
    usual = dict(zip(("mean", "std", "image_mean", "image_std"), (MEAN, STD, MEAN, STD)))
    path = bare(tmp_path)
    write_json(tmp_path / "open_clip_config.json", hub_config())
    for settings in (usual | {key: value}, usual):
        content = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
        write_json(tmp_path / file, content | ({section: settings} if section else settings))
        if settings is usual:
            write_json(tmp_path / file, content | (
                {section: usual} if section else usual | {"do_normalize": True}))
            assert load_clip(path).config == QUICK
        else:
            with pytest.raises(ValueError, match=rf"{file}: {key} is .*CLIP's") as error:
                load_clip(path)
            one_line(error)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder_of_open_clips_hub_is_read(suffix, tmp_path):
    """Also where a model.safetensors of another kind lies beside, as timm's in some."""
    safetensors = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    clip = make_clip(QUICK)
    tensors = foreign.to_layout(clip.state_dict(), "open_clip")
    if suffix == "bin":
        torch.save(tensors, tmp_path / "open_clip_pytorch_model.bin")
    else:
        safetensors.save_file(tensors, tmp_path / "open_clip_model.safetensors")
    safetensors.save_file({"cls_token": torch.zeros(1)}, tmp_path / "model.safetensors")
    write_json(tmp_path / "open_clip_config.json", hub_config(mean=MEAN, std=STD))
    loaded = load_clip(tmp_path)
    assert same_bits(clip, loaded) and loaded.config == QUICK


def in_shards(folder, clip):
    """The folder of Hugging Face with its tensors in two files and an index."""
    safetensors = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    export_clip(clip, folder, "huggingface")
    tensors = safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    place = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        safetensors.save_file({name: tensors[name] for name in tensors if place[name] == file},
                              folder / file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": place})
    return folder / "model.safetensors.index.json", folder / files[1]


def test_sharded_safetensors_are_read_by_their_index(tmp_path):
    clip = make_clip(QUICK)
    index, _ = in_shards(tmp_path, clip)
    loaded = load_clip(tmp_path)
    assert same_bits(clip, loaded) and same_bits(clip, load_clip(index))
    in_shards(tmp_path, make_clip(replace(QUICK, embed_dim=16)))
    write_json(index, json.loads(index.read_text()))
    assert load_clip(tmp_path).info["sha256"] != loaded.info["sha256"]  # by content


def test_a_missing_shard_and_a_bad_index_are_named(tmp_path):
    index, shard = in_shards(tmp_path, make_clip(QUICK))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name) as error:
        load_clip(tmp_path)
    one_line(error)
    write_json(index, {"weights": 1})
    with pytest.raises(ValueError, match=r"index\.json: not an index of weights") as error:
        load_clip(tmp_path)
    one_line(error)


# ------------------------------------------------------------------------------- the command export

@pytest.mark.parametrize("layout", ["openai", "open_clip", "huggingface"])
def test_the_command_exports_a_checkpoint(layout, tmp_path, capsys):
    from data.prepare import export
    if layout == "huggingface":
        pytest.importorskip("safetensors", reason="pip install safetensors")
    clip, target = make_clip(QUICK), tmp_path / "exported"
    save_ours(tmp_path / "ckpt.pt", clip)
    export.main([str(tmp_path / "ckpt.pt"), layout, str(target)])
    assert f"{target}: {layout} layout, quick-GELU" in capsys.readouterr().out
    said = True if layout == "open_clip" else None
    assert same_bits(clip, load_clip(target, quick_gelu=said))


def test_the_command_overwrites_nothing_and_says_how_it_is_written(tmp_path):
    from data.prepare import export
    save_ours(tmp_path / "ckpt.pt", make_clip())
    before = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(ValueError, match="ckpt.pt: is there already"):
        export.main([str(tmp_path / "ckpt.pt"), "open_clip", str(tmp_path / "ckpt.pt")])
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    with pytest.raises(ValueError, match="CHECKPOINT LAYOUT TARGET"):
        export.main([str(tmp_path / "ckpt.pt"), "open_clip"])


def test_the_command_takes_a_bare_file_once_its_activation_is_said(tmp_path):
    from data.prepare import export
    arguments = [str(bare(tmp_path)), "openai", str(tmp_path / "ViT.pt")]
    with pytest.raises(ValueError, match="nothing tells its activation"):
        export.main(arguments)
    export.main([*arguments, "--quick_gelu=true"])
    assert load_clip(tmp_path / "ViT.pt").config == QUICK


# ------------------------------------------------------------------------------- in the two scripts

@pytest.mark.parametrize("said", [True, False])
def test_pretrains_init_needs_the_activation_of_a_bare_file(said, tmp_path):
    import pretrain
    toy = replace(SIZES["toy"], vocab_size=50)
    path = bare(tmp_path, make_clip(toy))
    tokenizer = SimpleNamespace(size=50, text="words\n")

    def build(*options):
        argv = [f"--init={path}", "--model=toy", "--image_size=32", "--context_length=32"]
        config, _ = load_config(pretrain.Config, vars(pretrain), [*argv, *options])
        return pretrain.build(config, tokenizer)

    with pytest.raises(ValueError, match="nothing tells its activation"):
        build()
    clip, _, source = build(f"--quick_gelu={said}")
    assert clip.config.quick_gelu == said and str(path) in source


def test_perceptual_inits_init_needs_the_activation_of_a_bare_file(tmp_path):
    import perceptual_init
    path = bare(tmp_path, make_clip(replace(SIZES["toy"], vocab_size=50)))
    config = perceptual_init.Config(init=str(path), model="toy", image_size=32)
    with pytest.raises(ValueError, match="nothing tells its activation"):
        perceptual_init.build(config, "cpu")
    whole, _ = perceptual_init.build(replace(config, quick_gelu=True), "cpu")
    assert whole.config.quick_gelu



def test_names_and_shapes_are_those_of_openais_vit_b_32():
    """A sample of the 302 keys of the published file, and their number."""
    with torch.device("meta"):
        theirs = foreign.to_layout(CLIP(SIZES["ViT-B-32"]).state_dict(), "openai")
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert len(shapes) == 302
    assert shapes.items() >= {
        "positional_embedding": (77, 512), "text_projection": (512, 512), "logit_scale": (),
        "visual.class_embedding": (768,), "visual.positional_embedding": (50, 768),
        "visual.proj": (768, 512), "visual.conv1.weight": (768, 3, 32, 32),
        "visual.ln_pre.bias": (768,), "visual.ln_post.weight": (768,),
        "visual.transformer.resblocks.11.attn.in_proj_weight": (2304, 768),
        "visual.transformer.resblocks.0.attn.out_proj.bias": (768,),
        "visual.transformer.resblocks.0.ln_1.weight": (768,),
        "transformer.resblocks.0.attn.in_proj_bias": (1536,),
        "transformer.resblocks.11.mlp.c_fc.weight": (2048, 512),
        "transformer.resblocks.11.mlp.c_proj.weight": (512, 2048),
        "transformer.resblocks.5.ln_2.bias": (512,), "token_embedding.weight": (49408, 512),
        "ln_final.weight": (512,)}.items()


# ----------------------------------------------------------------------- against transformers' code

def test_transformers_opens_the_exported_folder(tmp_path):
    """Model, tokenizer and image processor; with CLIP's vocabulary the tokenizer's files are in."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from data.prepare import vocabulary as prepare_vocabulary
    from data.text import Tokenizer
    source = prepare_vocabulary.published_merges()
    if source == prepare_vocabulary.URL:
        pytest.skip("CLIP's merges are not here: pip install --no-deps open_clip_torch")
    clip = make_clip(replace(QUICK, vocab_size=49408, context_length=77))
    clip.vocabulary = prepare_vocabulary.tiktoken_text(prepare_vocabulary.read_merges(source))
    export_clip(clip, tmp_path, "huggingface")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path)
    captions, images = ["a dog", "Two cats, asleep!"], torch.randn(2, 3, 32, 32)
    tokens = transformers.CLIPTokenizer.from_pretrained(tmp_path)(
        captions, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = theirs(input_ids=tokens, pixel_values=images)
        image_emb, text_emb, scale = clip(images, Tokenizer(clip.vocabulary)(captions))
    torch.testing.assert_close(output.logits_per_image, scale * image_emb @ text_emb.T,
                               rtol=1e-5, atol=1e-5)  # fp32, sums in another order
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    assert processor.crop_size["height"] == 32


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_hugging_face_folder_or_file_is_read(suffix, tmp_path):
    pytest.importorskip("safetensors", reason="pip install safetensors")
    clip = make_clip()
    export_clip(clip, tmp_path, "huggingface")
    file = tmp_path / "model.safetensors"
    if suffix == "bin":  # as before safetensors; old files hold position ids, which are no weights
        tensors = foreign.read_file(file) | {
            "text_model.embeddings.position_ids": torch.arange(12)[None]}
        file.unlink()
        file = tmp_path / "pytorch_model.bin"
        torch.save(tensors, file, _use_new_zipfile_serialization=False)
    assert same_bits(clip, load_clip(tmp_path)) and same_bits(clip, load_clip(file))


def test_hugging_face_without_config_or_with_another_activation_is_refused(tmp_path):
    pytest.importorskip("safetensors", reason="pip install safetensors")
    export_clip(make_clip(), tmp_path, "huggingface")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"gelu"', '"gelu_new"'))
    with pytest.raises(ValueError, match="gelu_new") as error:
        load_clip(tmp_path)
    one_line(error)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="config.json") as error:
        load_clip(tmp_path)
    one_line(error)


def test_open_clips_own_model_gives_the_same_embeddings_and_takes_our_export(tmp_path):
    """In a process of its own, since torchvision is stood in for where it cannot load."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("pip install --no-deps open_clip_torch")
    done = subprocess.run([sys.executable, "-c", OPEN_CLIP, str(tmp_path)], timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


OPEN_CLIP = """
import sys, torch
from tests.bench.peer import load_peer
open_clip, why = load_peer()
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from data.prepare.export import export_clip
from model import load_clip
torch.manual_seed(0)
for quick in (False, True):
    theirs = CLIP(24, CLIPVisionCfg(layers=2, width=128, patch_size=8, image_size=32),
                  CLIPTextCfg(context_length=12, vocab_size=50, width=64, heads=1, layers=3),
                  quick_gelu=quick).eval()
    file, back = sys.argv[1] + "/theirs.pt", sys.argv[1] + "/ours.pt"
    torch.save(theirs.state_dict(), file)
    ours = load_clip(file, quick_gelu=quick)
    images, tokens = torch.randn(3, 3, 32, 32), torch.randint(1, 48, (3, 12))
    tokens[0, 3], tokens[1, 11], tokens[2, 1] = 49, 49, 49
    with torch.no_grad():
        for a, b in ((ours.encode_image(images), theirs.encode_image(images, normalize=True)),
                     (ours.encode_text(tokens), theirs.encode_text(tokens, normalize=True))):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    export_clip(ours, back, "open_clip")
    theirs.load_state_dict(torch.load(back))
"""


# ----------------------------------------------------------------------------- TorchScript archives

def torchscript(path, tensors):
    """An archive like OpenAI's: a tree of scripted modules that hold these tensors."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.register_buffer(leaf, tensor)
    torch.jit.save(torch.jit.script(root), path)


def openai_tensors(clip):
    config = asdict(clip.config)
    return foreign.to_layout(clip.state_dict(), "openai") | foreign.constants(config, "openai")


def test_openais_archive_is_read_in_half_precision(tmp_path):
    """The published files hold matrices as fp16, the rest as fp32: both become fp32."""
    clip, path = make_clip(QUICK), tmp_path / "ViT.pt"
    tensors = {name: tensor.half() if tensor.ndim > 1 else tensor
               for name, tensor in openai_tensors(clip).items()}
    torchscript(path, tensors)
    loaded = load_clip(path)
    assert loaded.config == QUICK and loaded.info["format"] == "openai"
    for name, tensor in clip.state_dict().items():
        expected = tensor.half().float() if tensor.ndim > 1 else tensor
        assert torch.equal(loaded.state_dict()[name], expected), name


@pytest.mark.parametrize("code", ["system", "rmtree"])  # torch blocks the first whatever we allow
def test_no_code_of_an_archive_is_run(code, tmp_path, monkeypatch):
    path, poisoned = tmp_path / "good.pt", tmp_path / "poisoned.pt"
    torchscript(path, openai_tensors(make_clip(QUICK)))
    monkeypatch.setattr(torch.jit, "load", None)  # nobody calls it
    load_clip(path)
    (tmp_path / "kept").mkdir()
    evil = Touch(tmp_path) if code == "system" else Remove(tmp_path / "kept")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(poisoned, "w") as new:
        for name in old.namelist():
            poison = name.endswith("/data.pkl")
            new.writestr(name, pickle.dumps(evil, 2) if poison else old.read(name))
    with pytest.raises(ValueError, match=rf"refused.*\.{code}") as error:
        load_clip(poisoned)
    one_line(error)
    assert not (tmp_path / "touched").exists() and (tmp_path / "kept").exists()


class Remove:
    """Pickled, it is a call of shutil.rmtree."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return shutil.rmtree, (self.folder,)


class Touch:
    """Pickled, it is a call of os.system that leaves a file."""

    def __init__(self, folder):
        self.command = f"touch {folder / 'touched'}"

    def __reduce__(self):
        return os.system, (self.command,)


# ------------------------------------------------------------------------------------ refused files

@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("save", [
    lambda content, path, protocol: torch.save(content, path, pickle_protocol=protocol),
    lambda content, path, protocol: path.write_bytes(pickle.dumps(content, protocol))])
def test_a_pickle_with_code_is_refused_and_not_run(save, protocol, tmp_path):
    path = tmp_path / "evil.pt"
    save({"weights": Touch(tmp_path)}, path, protocol)
    for read in (load_clip, load_vision, read_checkpoint):
        with pytest.raises(ValueError, match=r"evil\.pt: refused, .*(system|code)") as error:
            read(path)
        one_line(error)
    assert not (tmp_path / "touched").exists()


def change(weights, fault):
    name = [name for name in weights if name.endswith(("1.attn.in_proj_weight", "1.qkv.weight",
                                                       "1.self_attn.k_proj.weight"))][-1]
    if fault == "missing":
        del weights[name]
    elif fault == "extra":
        name = "text.adapter.weight"
        weights[name] = torch.zeros(3)
    else:
        weights[name] = weights[name][:-1]
    return name


@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
@pytest.mark.parametrize("layout", ["ours", "openai", "open_clip", "huggingface"])
def test_a_wrong_tensor_is_named(layout, fault, tmp_path):
    clip, path = make_clip(QUICK), tmp_path / "wrong.pt"
    if layout == "huggingface":
        pytest.importorskip("safetensors", reason="pip install safetensors")
        export_clip(clip, tmp_path, layout)
    weights = {**foreign.to_layout(clip.state_dict(), layout)}
    if layout == "openai":
        weights = openai_tensors(clip)
    name = change(weights, fault)
    if layout == "ours":
        save_ours(path, clip, weights=weights)
    else:
        torch.save(weights, path)
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        load_clip(path, quick_gelu=True)
    assert one_line(error).startswith(f"{path}: tensor {name} ")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"version https://git-lfs", b"\x80",
                                     bytes(1000)])
def test_what_is_no_weights_file_is_refused(content, tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.pt") as error:
        load_clip(path)
    one_line(error)


@pytest.mark.parametrize("layout", ["openai", "huggingface"])
def test_a_file_cut_short_is_refused(layout, tmp_path):
    if layout == "huggingface":
        pytest.importorskip("safetensors", reason="pip install safetensors")
    export_clip(make_clip(QUICK), tmp_path / "x", layout)
    file = tmp_path / "x" / "model.safetensors" if layout == "huggingface" else tmp_path / "x"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=re.escape(str(file))) as error:
        load_clip(file)
    one_line(error)


def test_other_weights_are_refused_by_what_is_missing(tmp_path):
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(ValueError, match="no CLIP.*visual.conv1.weight") as error:
        load_clip(tmp_path / "linear.pt")
    one_line(error)


def test_missing_files_are_said_to_be_missing(tmp_path):
    for path in (tmp_path / "no.pt", tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            load_clip(path)
        assert str(path) in one_line(error)


def test_a_layout_that_cannot_hold_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="quick-GELU"):
        export_clip(make_clip(SMALL), tmp_path / "x.pt", "openai")
    with pytest.raises(ValueError, match="heads"):
        export_clip(make_clip(replace(SMALL, vision_heads=4)), tmp_path / "x.pt", "open_clip")
    for layout in ("onnx", "ours"):
        with pytest.raises(ValueError, match=f"layout='{layout}'"):
            export_clip(make_clip(), tmp_path / "x.pt", layout)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------- checkpoints

def test_the_vision_tower_comes_from_stage_1_or_from_any_clip(tmp_path):
    clip = make_clip()
    save_ours(tmp_path / "clip.pt", clip)
    save_ours(tmp_path / "vision.pt", clip, kind="vision", weights=clip.vision.state_dict())
    export_clip(clip, tmp_path / "open.pt", "open_clip")
    for name in ("clip.pt", "vision.pt", "open.pt"):
        vision = load_vision(tmp_path / name, quick_gelu=False)
        assert isinstance(vision, VisionTower) and not vision.training
        assert same_bits(vision, clip.vision) and vision.config == SMALL
        assert vision.info["path"] == str(tmp_path / name)
    with pytest.raises(ValueError, match="stage 1") as error:
        load_clip(tmp_path / "vision.pt")
    one_line(error)


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    write_checkpoint(path, {"step": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(path, {"step": 2})
    assert torch.load(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_full_disk_is_an_os_error(tmp_path):
    """Of torch.save's own zip writer too: files may grow to 100 KB here."""
    import resource
    import signal
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ,
                                                                            signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(OSError):
            write_checkpoint(tmp_path / "big.pt", {"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_checksum_depends_on_names_and_values_and_not_on_order():
    weights = make_clip().state_dict()
    checksum = weights_checksum(weights)
    assert re.fullmatch("[0-9a-f]{16}", checksum)
    assert weights_checksum(dict(reversed(weights.items()))) == checksum
    weights["logit_scale"] = weights["logit_scale"] + 1e-6
    assert weights_checksum(weights) != checksum


def test_a_foreign_file_is_not_one_of_our_checkpoints(tmp_path):
    export_clip(make_clip(), tmp_path / "x.pt", "open_clip")
    with pytest.raises(ValueError, match="not a checkpoint of this project") as error:
        read_checkpoint(tmp_path / "x.pt")
    one_line(error)
