"""Weights -> a file or folder that other programs open.

    python -m data.prepare.export CHECKPOINT LAYOUT TARGET

LAYOUT is "openai" or "open_clip", TARGET then a file, or "huggingface", a folder for
transformers' CLIPModel. CHECKPOINT is a whole CLIP, of ours or of anyone that model.load_clip
reads. Nothing is overwritten.
"""
from dataclasses import asdict, dataclass
from pathlib import Path

from configs import load_config  # before torch: see there
from data import weights as files
from data.log import run_main
from model import load_clip, write_checkpoint


@dataclass
class Config:
    quick_gelu: bool | None = None  # activation of foreign weights that do not tell it


def export_clip(clip, path, layout):
    """Writes a file for OpenAI's code ("openai") or open_clip, or a folder ("huggingface").

    The folder holds a tokenizer too if the model has CLIP's vocabulary. ValueError where the
    layout cannot say what the model is: heads that are not 64 wide, or GELU for OpenAI.
    """
    if layout not in ("openai", "open_clip", "huggingface"):
        raise ValueError(f"layout={layout!r}: openai, open_clip or huggingface")
    weights = files.to_layout(files.without_extra(clip.state_dict()), layout)
    if layout == "huggingface":
        files.write_folder(path, weights, asdict(clip.config), clip.vocabulary)
    else:
        write_checkpoint(path, weights | files.constants(asdict(clip.config), layout))


def main(argv=None):
    config, others = load_config(Config, globals(), argv)
    if len(others) != 3:
        raise ValueError("write: python -m data.prepare.export CHECKPOINT LAYOUT TARGET")
    checkpoint, layout, target = others
    if Path(target).exists():
        raise ValueError(f"{target}: is there already; name another target")
    clip = load_clip(checkpoint, quick_gelu=config.quick_gelu)
    export_clip(clip, target, layout)
    gelu = "quick-GELU" if clip.config.quick_gelu else "GELU"
    print(f"{target}: {layout} layout, {gelu}")


if __name__ == "__main__":
    run_main(main)
