"""configs/ideas, the recipes on views, targets and locked towers: the exact facts of each."""
import dataclasses
import importlib
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pretrain
from data.images import Augmentation
from data.pairs import Pairs
from data.ranks import Ranks
from data.shards import Shards, index_shards
from data.text import Tokenizer
from model import (CLIP, SIZES, optimizer_groups, read_checkpoint, weights_checksum,
                   write_checkpoint)
from tests.test_ideas import ROOT, hooks_of, random_rows, run


def private(idea):
    """The recipe as a module, for the functions that are its own."""
    return importlib.import_module(f"configs.ideas.{idea}")


def settings(**values):
    return types.SimpleNamespace(loss_chunk=0, **values)


def toy_clip(seed=0):
    torch.manual_seed(seed)
    return CLIP(dataclasses.replace(SIZES["toy"], vocab_size=600))


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def toy_batch(b=4):
    """What encode() takes, without the arrays of a recipe; each text is start, a word, end."""
    torch.manual_seed(1)
    tokens = torch.zeros(b, 32, dtype=torch.int64)
    tokens[:, 0], tokens[:, 2] = 598, 599
    tokens[:, 1] = torch.randint(598, (b,))
    return {"views": torch.randn(b, 3, 32, 32), "tokens": tokens}


class OneOfTwo:
    """A rank of two as global_loss sees it: gather() finds the rows of both in `whole`."""

    def __init__(self, rank, whole):
        self.rank, self.world, self.whole = rank, 2, whole

    def part(self):
        half = len(self.whole["image"]) // 2
        own = slice(self.rank * half, (self.rank + 1) * half)
        return {name: row[own] if row.ndim else row for name, row in self.whole.items()}

    def gather(self, *rows):
        own, found = self.part(), []
        for row in rows:
            for name, whole in self.whole.items():
                if own[name].shape == row.shape and torch.equal(own[name], row):
                    found.append(whole)
                    break
        assert len(found) == len(rows)
        return found


def same_on_two_ranks(hooks, rows, config):
    """Is the mean of two ranks' losses the loss of one that has all rows?"""
    halves = [hooks.global_loss(ranks.part(), config, ranks)
              for ranks in (OneOfTwo(0, rows), OneOfTwo(1, rows))]
    return sum(halves).item() / 2 == pytest.approx(
        hooks.global_loss(rows, config, Ranks()).item(), rel=1e-12)


def plain(rows):
    return pretrain.global_loss(rows, settings(), Ranks()).item()


@pytest.fixture(scope="module")
def short_run(toy_world):
    """short_run(idea, out_dir, *more): four steps of 16 pairs; returns the weights."""
    def of(idea, out_dir, *more):
        run([f"{ROOT}/configs/toy.py", f"{ROOT}/configs/ideas/{idea}.py",
             f"--data={toy_world}/pairs", f"--vocabulary={toy_world}/vocabulary/toy.tiktoken",
             "--held_out=", f"--out_dir={out_dir}", "--batch_size=16", "--max_steps=4",
             "--warmup_steps=1", "--workers=0", "--keep_at=()", *more])
        return read_checkpoint(f"{out_dir}/ckpt.pt")["weights"]
    return of


@pytest.fixture(scope="module")
def toy_pairs(toy_world):
    """toy_pairs(idea, **settings) -> (Pairs of the toy world with the idea's arrays, config)."""
    tokenizer = Tokenizer(f"{toy_world}/vocabulary/toy.tiktoken")
    index_shards(f"{toy_world}/pairs", tokenizer)
    shards = Shards(f"{toy_world}/pairs", tokenizer)

    def of(idea, **values):
        config = settings(model="toy", image_size=32, context_length=32, seed=3, **values)
        return Pairs(shards, tokenizer, config, Augmentation(), pretrain.pick_caption,
                     hooks_of(idea).extra_arrays), config
    return of


@pytest.fixture(scope="module")
def start(toy_world, tmp_path_factory):
    """A CLIP of the toy's size on disk, with the toy world's vocabulary."""
    folder = tmp_path_factory.mktemp("start")
    run([f"{ROOT}/configs/toy.py", f"--data={toy_world}/pairs", f"--out_dir={folder}",
         f"--vocabulary={toy_world}/vocabulary/toy.tiktoken", "--held_out=", "--batch_size=16",
         "--max_steps=1", "--workers=0", "--keep_at=()"])
    return folder / "ckpt.pt"


# ----------------------------------------------------------------------------------------- align

def smoothed(rows, smoothing):
    """Cross-entropy with smoothed targets, target by target."""
    b, total = len(rows["image"]), 0.0
    for one, other in (("image", "text"), ("text", "image")):
        logits = rows["scale"] * rows[one] @ rows[other].T
        for i in range(b):
            for j in range(b):
                target = smoothing / b + (1 - smoothing) * (i == j)
                total -= target * (logits[i, j] - logits[i].exp().sum().log())
    return total.item() / (2 * b)


def test_align_equals_the_loop_over_targets_and_without_smoothing_the_plain_loss():
    rows, hooks = random_rows(6), hooks_of("align")
    ours = hooks.global_loss(rows, settings(smoothing=0.1), Ranks()).item()
    assert ours == pytest.approx(smoothed(rows, 0.1), rel=1e-12)
    assert ours != pytest.approx(plain(rows), rel=1e-3)
    assert hooks.global_loss(rows, settings(smoothing=0.0), Ranks()).item() == plain(rows)
    assert same_on_two_ranks(hooks, rows, settings(smoothing=0.1))
