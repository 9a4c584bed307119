"""open_clip, to measure beside: its package, its CLIP of our sizes, its training step.

It is optional: `pip install open_clip_torch` brings it, with a torchvision made for the installed
torch. Where torchvision is missing or cannot load (a CUDA build beside a CPU torch stops at
"operator torchvision::nms does not exist"), its names are stood in for by empty classes. Only
open_clip's image transforms use them, no bench does, and they import in no time: to the peer's
advantage. Everything measured is open_clip's own code.
"""
import functools
import importlib.machinery
import logging
import math
import sys
import types

import torch

TORCHVISION = ("torchvision", "torchvision.ops", "torchvision.ops.misc", "torchvision.transforms",
               "torchvision.transforms.functional")


class StandIn(types.ModuleType):
    """A module whose every name is an empty class."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"BICUBIC": "bicubic", "BILINEAR": "bilinear"})  # InterpolationMode


def stand_in_for_torchvision():
    """Put empty modules where torchvision's would be."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name in TORCHVISION:
        module = sys.modules[name] = StandIn(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def load_peer(name="open_clip"):
    """The open_clip module and a line about it; None and what to install where it is missing."""
    return import_open_clip() if name == "open_clip" else (None, "ours alone: no peer asked for")


@functools.cache
def import_open_clip():
    try:
        import torchvision
        how = f"torchvision {torchvision.__version__}"
    except (ImportError, RuntimeError) as error:
        stand_in_for_torchvision()
        how = f"torchvision stood in for: {str(error).splitlines()[0]}"
    try:
        import open_clip
    except ImportError as error:
        return None, f"ours alone ({error}); for the peer: pip install open_clip_torch"
    logging.getLogger().setLevel(logging.ERROR)  # it warns that weights are random: they shall be
    return open_clip, f"open_clip {open_clip.__version__}, {how}"


def peer_clip(open_clip, config):
    """open_clip's CLIP with the sizes of our CLIPConfig, random weights."""
    return open_clip.CLIP(
        config.embed_dim,
        open_clip.CLIPVisionCfg(layers=config.vision_layers, width=config.vision_width,
                                head_width=config.vision_width // config.vision_heads,
                                patch_size=config.patch_size, image_size=config.image_size),
        open_clip.CLIPTextCfg(context_length=config.context_length, vocab_size=config.vocab_size,
                              width=config.text_width, heads=config.text_heads,
                              layers=config.text_layers),
        quick_gelu=config.quick_gelu)


class PeerStep:
    """open_clip's update as its own trainer does it: ClipLoss under autocast, AdamW, clamp."""

    def __init__(self, open_clip, config, device, dtype, compiled=False):
        self.clip = peer_clip(open_clip, config).to(device).train()
        self.model = torch.compile(self.clip) if compiled else self.clip  # its --torchcompile
        self.device, self.bf16 = device, dtype == "bfloat16"
        self.loss = open_clip.ClipLoss()
        plain, decayed = [], []  # its rule: no decay on gains, biases and the temperature
        for name, parameter in self.clip.named_parameters():
            skip = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias"))
            (plain if skip or "logit_scale" in name else decayed).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}],
            lr=5e-4, betas=(0.9, 0.98), eps=1e-6)

    def __call__(self, images, tokens, mark=lambda: None):
        """One update on (B, 3, S, S), (B, L); marks after forward, backward, clip (it has none)."""
        tokens = tokens.to(self.device)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            image_emb, text_emb, scale = self.model(images, tokens)  # (B, E), (B, E), ()
            mark()
            loss = self.loss(image_emb, text_emb, scale)
        loss.backward()
        mark()
        mark()
        self.optimizer.step()
        self.clip.logit_scale.data.clamp_(0, math.log(100))
