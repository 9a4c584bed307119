"""What the bench of ideas asks a trained model, beyond the sets of evaluate.py.

    measure("out/ideas/negclip_0", "negclip")   # -> {figure: value}

The scenes are drawn anew by data.prepare.toy's functions, from a seed that no world uses: their
objects, places and true captions are known. Shares are in %. Each question about the picture has
a blind form, which knows all but the picture (or all but the text) and must stay at chance.
Letters: n pictures, E embedding, S pixels, V words of the vocabulary, L tokens.
"""
import functools
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from configs.ideas.mosaic import _mosaics, _quarters
from data.images import Pixels
from data.pairs import HeldOut
from data.prepare.toy import (CLASSIFICATION, COLORS, RETRIEVAL, SHAPES, SIDE, draw_scenes,
                              render, with_article)
from data.shards import Shards
from data.text import Tokenizer
from evaluate import embed, embed_texts, two_afc
from model import CLIP, CLIPConfig, load_clip, read_checkpoint

SCENES = 1000  # of each question
SEED = 987654  # of their generator
# load_clip would build another tower than these arms have
OWN_TOWERS = ("fdt", "vitamin", "vitamin_equal", "projectors")
WRITERS = ("coca", "sycoca")                   # these have a decoder


# ---------------------------------------------------------------- evaluators, without any model

def choice(images, right, wrong):
    """Share of pictures nearer to the right caption, ties half; (n, E) unit rows each."""
    first = torch.zeros(len(images))  # label 0: the first of the two is right
    return two_afc(images, right, wrong, first).mean().item()


def blind(rows):
    """The mean of unit rows (n, E), as often: what is left when the one row is unknown."""
    return rows.mean(0, keepdim=True).expand_as(rows)


def quarter_hits(quarters, texts, truth):
    """Is the quarter that is nearest to the text the true one? -> (n,) bool.

    quarters: (n, 4, E) unit rows, row by row from the top left; texts: (n, E); truth: (n,).
    """
    cosines = (quarters * texts[:, None]).sum(2)                         # (n, 4)
    return cosines.argmax(1) == torch.as_tensor(truth)


def mean_gap(images, texts):
    """Distance between the mean picture and the mean caption; unit rows (n, E), (m, E)."""
    return (images.mean(0) - texts.mean(0)).norm().item()


def word_shares(captions, end, size):
    """Share of each token id among all that a decoder writes: the words and an end a caption.

    captions: lists of ids without start and end. Returns (size,); one is added to each count.
    """
    counts = np.ones(size)
    for ids in captions:
        np.add.at(counts, np.asarray(ids, np.int64), 1)
        counts[end] += 1
    return counts / counts.sum()


def unigram_loss(captions, end, shares):
    """Mean over captions of the mean of -log share over their words and end token, in nats."""
    losses = []
    for ids in captions:
        written = np.append(np.asarray(ids, np.int64), end)
        losses.append(-np.log(shares[written]).mean())
    return float(np.mean(losses))


def active_codes(weights):
    """Mean count of codes above 0; weights (n, K) of at least 0."""
    return (weights > 0).sum(1).float().mean().item()


# ---------------------------------------------------------------- scenes and their captions

class Pictures:
    """uint8 (n, 64, 64, 3) as the items of data.images.Pixels."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays)

    def image(self, i):
        return Image.fromarray(self.arrays[i])


def two_objects(n, side_by_side=False):
    """n scenes of two objects of different colours and shapes, and their Pictures.

    side_by_side: their centres are more than a quarter of the picture apart, from left to right.
    """
    rng = np.random.default_rng(SEED)
    scenes = draw_scenes(rng, 4 * n, count=np.full(4 * n, 2))
    across = np.abs(scenes.xy[:, 0, 0] - scenes.xy[:, 1, 0])             # (4n,) pixels
    fit = (scenes.color[:, 0] != scenes.color[:, 1]) & (scenes.shape[:, 0] != scenes.shape[:, 1])
    if side_by_side:
        fit &= across > SIDE / 4
    scenes = scenes[np.flatnonzero(fit)[:n]]
    assert len(scenes) == n
    return scenes, Pictures(render(scenes, rng))


def named(color, shape):
    """Numbers of a colour and a shape -> "an orange star"."""
    return with_article(f"{COLORS[color]} {SHAPES[shape]}")


def color_captions(scenes):
    """Right captions of two objects, and the same with the colours swapped."""
    right, wrong = [], []
    for (one, other), (shape, other_shape) in zip(scenes.color[:, :2], scenes.shape[:, :2]):
        right.append(f"{named(one, shape)} and {named(other, other_shape)}")
        wrong.append(f"{named(other, shape)} and {named(one, other_shape)}")
    return right, wrong


def side_captions(scenes):
    """Captions that say on which side the first object is, and the same with the other side."""
    right, wrong = [], []
    for i in range(len(scenes)):
        first = named(scenes.color[i, 0], scenes.shape[i, 0])
        second = named(scenes.color[i, 1], scenes.shape[i, 1])
        sides = ("left", "right")
        if scenes.xy[i, 0, 0] > scenes.xy[i, 1, 0]:
            sides = ("right", "left")
        right.append(f"{first} {sides[0]} of {second}")
        wrong.append(f"{first} {sides[1]} of {second}")
    return right, wrong


def quarter_of(xy):
    """Centres in pixels (n, 2), right and down -> quarters, row by row from the top left."""
    return 2 * (xy[:, 1] > SIDE / 2) + (xy[:, 0] > SIDE / 2)


# ---------------------------------------------------------------- asking a model

@functools.cache
def questions():
    """All scenes with their captions: drawn once a process."""
    colors, color_pictures = two_objects(SCENES)
    sides, side_pictures = two_objects(SCENES, side_by_side=True)
    rng = np.random.default_rng(SEED + 1)
    singles = draw_scenes(rng, SCENES, many=0)
    tiles = []
    for color, shape in zip(singles.color[:, 0], singles.shape[:, 0]):
        tiles.append(named(color, shape))
    firsts = []
    for color, shape in zip(colors.color[:, 0], colors.shape[:, 0]):
        firsts.append(named(color, shape))
    return SimpleNamespace(
        color_pictures=color_pictures, color_captions=color_captions(colors),
        side_pictures=side_pictures, side_captions=side_captions(sides),
        firsts=firsts, quarters=quarter_of(colors.xy[:, 0]),
        tile_pictures=Pictures(render(singles, rng)), tiles=tiles)


def ask(clip, tokenizer, held_out):
    """Figures of a plain CLIP: choices of captions, quarters, the gap; shares in %."""
    asked, cache, size = questions(), {}, clip.config.image_size
    how = {"device": "cpu", "batch_size": 200}

    def pictures(items, encode=clip.encode_image):
        return embed(encode, Pixels(items, size), **how)                 # (n, E)

    def texts(captions):
        return embed_texts(clip, tokenizer, captions, cache, "cpu")      # (n, E)

    figures = {}
    for name, items, captions in (
            ("colors", asked.color_pictures, asked.color_captions),
            ("sides", asked.side_pictures, asked.side_captions)):
        images, right, wrong = pictures(items), texts(captions[0]), texts(captions[1])
        figures[name] = 100 * choice(images, right, wrong)
        figures[f"{name}_blind"] = 100 * choice(blind(images), right, wrong)

    def quarters(views):  # (b, 3, S, S) -> (b, 4, E)
        tokens = clip.vision(views, every=True)[:, 1:]
        return torch.nn.functional.normalize(_quarters(tokens), dim=2)

    def tiles(views):  # of four pictures the quarters of one mosaic: (b, 3, S, S) -> (b, E)
        return quarters(_mosaics(views)).flatten(0, 1)

    found, words = pictures(asked.color_pictures, quarters), texts(asked.firsts)
    figures["quarter"] = quarter_hits(found, words, asked.quarters)
    figures["quarter_blind"] = quarter_hits(found, blind(words), asked.quarters)
    found = pictures(asked.tile_pictures, tiles).unflatten(0, (-1, 4))   # (n / 4, 4, E)
    truth = np.arange(len(found)) % 4                                    # which of the four
    words = texts(asked.tiles)[4 * np.arange(len(found)) + truth]
    figures["tile"] = quarter_hits(found, words, truth)
    for name in ("quarter", "quarter_blind", "tile"):
        figures[name] = 100 * figures[name].float().mean().item()
    figures["gap"] = mean_gap(pictures(held_out), texts(held_out.captions))
    return figures


def load_with_parts(path, idea):
    """The CLIP of a checkpoint with all that the recipe `idea` hung on it, in eval mode."""
    content = read_checkpoint(path)
    clip = CLIP(CLIPConfig(**content["model"]))
    recipe = importlib.import_module(f"configs.ideas.{idea}")
    recipe.prepare_model(clip, SimpleNamespace(**content["config"]))
    clip.load_state_dict(content["weights"])
    clip.vocabulary = content["vocabulary"]
    return clip.eval(), recipe


@torch.no_grad()
def ask_writer(run, idea, tokenizer, held_out):
    """Word losses in nats of coca and sycoca: own picture, another's, and the unigrams'."""
    from configs.ideas import coca
    clip, _ = load_with_parts(f"{run}/ckpt.pt", idea)
    tokens = tokenizer(held_out.captions, clip.config.context_length)    # (n, L)
    pixels = Pixels(held_out, clip.config.image_size)
    patches = embed(lambda views: clip.vision(views, every=True), pixels, "cpu", 250)
    words = clip.text(tokens, every=True)                                # (n, longest, E)
    losses = {}
    for name, seen in (("words", patches), ("words_blind", patches.roll(1, 0))):
        rows = coca._rows(clip, {"tokens": tokens}, seen, words)
        losses[name] = rows["captioning"].mean().item()
    return losses


def ask_unigrams(data, tokenizer, held_out):
    """Word loss in nats of the training captions' unigrams on held-out captions."""
    shards = Shards(data, tokenizer)
    captions = [shards.ids(i, 0) for i in range(len(shards))]
    shares = word_shares(captions, tokenizer.end, tokenizer.size)
    return {"unigrams": unigram_loss(tokenizer.encode(held_out.captions), tokenizer.end, shares)}


def ask_codebook(run, held_out):
    """Codes of a picture that are above 0."""
    clip, fdt = load_with_parts(f"{run}/ckpt.pt", "fdt")

    def weights(views):
        tokens = clip.vision(views, every=True)
        real = torch.ones(tokens.shape[:2], dtype=torch.bool)
        return fdt._weights(clip, clip.vision, tokens, real)

    found = embed(weights, Pixels(held_out, clip.config.image_size), "cpu", 250)
    return {"codes": active_codes(found)}


def last_look(run):
    """Figures of the run's last look, in %: each set, R@1, and the means of both kinds."""
    records = Path(run, "log.jsonl").read_text().splitlines()
    record = json.loads(records[-1])
    figures = {"r1": 100 * record["val_mean_recall@1"]}
    for name in (*CLASSIFICATION, *RETRIEVAL):
        figures[name] = 100 * record[f"zero_shot/{name}"]
    figures["sets"] = float(np.mean([figures[name] for name in CLASSIFICATION]))
    figures["recall"] = float(np.mean([figures[name] for name in RETRIEVAL]))
    return figures


def measure(run, arm, data="data/toy/pairs"):
    """All figures of a finished run: those of its last look, and what else its model can tell.

    ValueError for a run that was stopped before its last step.
    """
    content = read_checkpoint(f"{run}/ckpt.pt")
    step = content["samples"] // content["config"]["batch_size"]
    if step < content["config"]["max_steps"]:
        raise ValueError(f"{run}: stopped at step {step}; the same command goes on")
    if content["kind"] == "vision":
        return {}  # stage 1 alone: it knows no captions
    figures = last_look(run)
    held_out = HeldOut(f"{data}/held_out")
    if arm == "fdt":
        return figures | ask_codebook(run, held_out)
    if arm in OWN_TOWERS:
        return figures
    clip = load_clip(f"{run}/ckpt.pt")
    tokenizer = Tokenizer(clip.vocabulary)
    figures |= ask(clip, tokenizer, held_out)
    if arm in WRITERS:
        figures |= ask_writer(run, arm, tokenizer, held_out)
        figures |= ask_unigrams(data, tokenizer, held_out)
    return figures
