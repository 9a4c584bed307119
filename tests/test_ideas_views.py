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


def tower_of(weights, tower):
    return weights_checksum({name: tensor for name, tensor in weights.items()
                             if name.startswith(f"{tower}.")})


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
    """toy_pairs(idea, **settings) -> Pairs of the toy world with the idea's arrays, config."""
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


# ---------------------------------------------------------------------------------------- align

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


# --------------------------------------------------------------------------------------- refine

def refine_rows(b=6):
    rows = random_rows(b)
    z = unit(b, 8)
    way = (rows["image"] - z).square().sum(1) + (rows["text"] - z).square().sum(1)
    return rows | {"way": way, "start_image": unit(b, 8), "start_text": unit(b, 8),
                   "start_scale": torch.tensor(7.0, dtype=torch.float64)}


def test_refine_equals_the_loop_over_targets_and_both_weights_at_zero_are_the_plain_loss():
    rows, hooks, total = refine_rows(), hooks_of("refine"), 0.0
    for one, other in (("image", "text"), ("text", "image")):
        logits = 5.0 * rows[one] @ rows[other].T
        opinion = (7.0 * rows[f"start_{one}"] @ rows[f"start_{other}"].T).softmax(1)
        for i in range(6):
            for j in range(6):
                target = 0.3 * opinion[i, j] + 0.7 * (i == j)
                total += target * (target.log() - logits.log_softmax(1)[i, j]) / 12
    expected = total + 2.0 * rows["way"].mean()
    ours = hooks.global_loss(rows, settings(pull=2.0, soft=0.3), Ranks())
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
    off = hooks.global_loss(rows, settings(pull=0.0, soft=0.0), Ranks())
    assert off.item() == pytest.approx(plain(rows), rel=1e-12)
    assert same_on_two_ranks(hooks, rows, settings(pull=2.0, soft=0.3))


def test_refine_with_the_starts_own_opinion_has_nothing_to_learn_at_the_start():
    hooks, clip, config = hooks_of("refine"), toy_clip().double(), settings(pull=0.0, soft=1.0)
    hooks.prepare_model(clip, config)
    batch = toy_batch() | {"z": unit(4, 64)}
    rows = hooks.encode(clip, batch | {"views": batch["views"].double()}, config)
    loss = hooks.global_loss(rows, config, Ranks())
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert max(p.grad.abs().max() for p in clip.parameters() if p.grad is not None) < 1e-12
    assert not any(p.requires_grad for p in clip.extra.start.parameters())


def test_refine_pulls_both_of_a_pair_to_one_vector_of_unit_length(toy_pairs):
    pairs, _ = toy_pairs("refine")
    batch = pairs.__getitems__([(0, i) for i in range(8)])
    assert torch.allclose(batch["z"].norm(dim=1), torch.ones(8))
    assert len({tuple(z.tolist()) for z in batch["z"]}) == 8
    hooks, clip = hooks_of("refine"), toy_clip()
    hooks.prepare_model(clip, None)
    rows = hooks.encode(clip, toy_batch() | {"z": batch["z"][:4]}, None)
    for i in range(4):
        to_z = [(rows[name][i] - batch["z"][i]).norm() ** 2 for name in ("image", "text")]
        assert rows["way"][i].item() == pytest.approx(sum(to_z).item(), rel=1e-5)


def test_refine_keeps_its_start_and_says_so_if_there_is_none(short_run, start, tmp_path):
    weights = short_run("refine", tmp_path / "a", f"--init={start}", "--lr=1e-3")
    before = read_checkpoint(start)["weights"]
    for name, tensor in before.items():
        assert torch.equal(weights[f"extra.start.{name}"], tensor)
    assert tower_of(weights, "vision") != tower_of(before, "vision")
    with pytest.raises(FileNotFoundError, match="none.pt: no such file"):
        short_run("refine", tmp_path / "b", f"--init={tmp_path}/none.pt")


# ------------------------------------------------------------------------------------------ lit

@pytest.mark.parametrize("lock, learns", [("vision", "text"), ("text", "vision")])
def test_lit_leaves_the_locked_tower_as_it_was(short_run, start, tmp_path, lock, learns):
    weights = short_run("lit", tmp_path, "--init_vision=", f"--init={start}", f"--lock={lock}")
    before = read_checkpoint(start)["weights"]
    assert tower_of(weights, lock) == tower_of(before, lock)
    assert tower_of(weights, learns) != tower_of(before, learns)


def test_lit_locks_the_tower_that_stage_1_left(short_run, tmp_path):
    vision = toy_clip(seed=5).vision
    write_checkpoint(tmp_path / "stage1.pt", {
        "format": pretrain.FORMAT, "kind": "vision", "weights": vision.state_dict(),
        "model": dataclasses.asdict(vision.config)})
    weights = short_run("lit", tmp_path / "run", f"--init_vision={tmp_path}/stage1.pt")
    for name, tensor in vision.state_dict().items():
        assert torch.equal(weights[f"vision.{name}"], tensor)


def test_lit_with_projectors_trains_them_and_the_temperature_only(short_run, start, tmp_path):
    weights = short_run("lit", tmp_path, "--projectors", "--init_vision=", f"--init={start}")
    before = read_checkpoint(start)["weights"]
    assert {"vision.projection.mlp.0.weight", "text.projection.mlp.2.bias"} <= weights.keys()
    for name, tensor in before.items():
        where = name.replace("projection.", "projection.linear.")
        changes = "projection." in name or name == "logit_scale"
        assert torch.equal(weights[where], tensor) != changes, name


def test_a_projector_is_the_old_projection_and_a_perceptron():
    clip = toy_clip()
    config = settings(lock="vision", projectors=True, init="some.pt")
    old, x = clip.text.projection, torch.randn(5, 96)
    hooks_of("lit").prepare_model(clip, config)
    new = clip.text.projection
    assert torch.equal(new(x), old(x) + new.mlp(x))
    trained = [name for group in optimizer_groups(clip, 0.1) for name in group["names"]]
    assert all(".projection." in name or name == "logit_scale" for name in trained)
    assert len(trained) == 2 * 5 + 1  # W, two layers with biases


@pytest.mark.parametrize("values, message", [
    ({"lock": "picture"}, "lock=picture: must be vision or text"),
    ({"lock": "text"}, "init=: a locked text tower needs weights"),
    ({"projectors": True}, "init=: a locked text tower needs weights")])
def test_lit_says_what_it_cannot_lock(values, message):
    config = settings(**({"lock": "vision", "projectors": False, "init": ""} | values))
    with pytest.raises(ValueError, match=message):
        hooks_of("lit").prepare_model(toy_clip(), config)


# --------------------------------------------------------------------------------------- mosaic

def test_a_mosaic_laid_back_is_its_images_at_half_their_size():
    views = torch.randn(8, 3, 32, 32)
    mosaics = private("mosaic")._mosaics(views)
    assert mosaics.shape == (2, 3, 32, 32)
    for i in range(8):
        down, right = 16 * (i % 4 // 2), 16 * (i % 2)
        small = F.interpolate(views[i:i + 1], (16, 16), mode="bilinear", antialias=True)[0]
        assert torch.equal(mosaics[i // 4, :, down:down + 16, right:right + 16], small)


@pytest.mark.parametrize("side", [4, 6])
def test_a_quarter_is_the_mean_of_its_own_images_patches(side):
    mosaic = private("mosaic")
    grey = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 8 * side, 8 * side)  # image i is i
    patches = mosaic._mosaics(grey).unfold(2, 8, 8).unfold(3, 8, 8).mean((1, 4, 5))
    quarters = mosaic._quarters(patches.flatten(1)[:, :, None])           # (2, 4, 1)
    assert torch.allclose(quarters.flatten(), torch.arange(8.0), atol=1e-5)
    tokens = torch.randn(2, side * side, 5)
    plane = tokens.unflatten(1, (side, side))
    by_hand = plane[:, :side // 2, side // 2:].mean((1, 2))               # top right
    assert torch.allclose(mosaic._quarters(tokens)[:, 1], by_hand, atol=1e-6)


def test_mosaic_at_weight_0_is_the_plain_loss_and_adds_that_of_the_quarters():
    rows, hooks = random_rows(8), hooks_of("mosaic")
    rows["quarter"] = unit(8, 8)
    assert hooks.global_loss(rows, settings(weight=0.0), Ranks()).item() == plain(rows)
    expected = plain(rows) + 0.5 * plain(rows | {"image": rows["quarter"]})
    ours = hooks.global_loss(rows, settings(weight=0.5), Ranks()).item()
    assert ours == pytest.approx(expected, rel=1e-12)
    assert same_on_two_ranks(hooks, rows, settings(weight=0.5))


def test_each_row_of_quarters_belongs_to_the_image_of_its_row():
    hooks, clip, batch = hooks_of("mosaic"), toy_clip(), toy_batch(8)
    config = settings(prompter=False)
    before = hooks.encode(clip, batch, config)["quarter"]
    batch["views"][5] += 1
    change = (hooks.encode(clip, batch, config)["quarter"] - before).norm(dim=1)
    assert change.argmax() == 5 and change[:4].max() == 0  # the second mosaic's second quarter


def test_the_prompters_queries_learn_and_tell_quarters_apart():
    hooks, clip = hooks_of("mosaic"), toy_clip()
    config = settings(prompter=True, batch_size=16, micro_batch=0)
    hooks.prepare_model(clip, config)
    rows = hooks.encode(clip, toy_batch(8), config)
    rows["quarter"].sum().backward()
    assert rows["quarter"].shape == (8, 64)
    assert clip.extra.queries.grad.abs().sum(1).min() > 0
    assert not torch.allclose(rows["quarter"][0], rows["quarter"][1], atol=1e-3)


@pytest.mark.parametrize("values, message", [
    ({"batch_size": 18, "micro_batch": 0}, "batch_size / ranks=18: mosaics need a multiple"),
    ({"batch_size": 16, "micro_batch": 6}, "micro_batch=6: mosaics need a multiple of 4")])
def test_mosaic_says_that_four_images_make_one(values, message):
    with pytest.raises(ValueError, match=message):
        hooks_of("mosaic").prepare_model(toy_clip(), settings(prompter=False, **values))


def test_mosaic_counts_a_ranks_own_images(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = settings(prompter=False, batch_size=24, micro_batch=0)
    with pytest.raises(ValueError, match="batch_size / ranks=6"):
        hooks_of("mosaic").prepare_model(toy_clip(), config)


# --------------------------------------------------------------------------------------- pixpro

def agreement_by_loops(x, t, crop, other):
    """Of one image: x, t (P, E) of its crops, crop and other (x, y, side)."""
    P, side, found = len(x), round(len(x) ** 0.5), []

    def centre(box, patch):
        return (box[0] + (patch % side + 0.5) / side * box[2],
                box[1] + (patch // side + 0.5) / side * box[2])

    for i in range(P):
        y = sum(max(float(x[i] @ x[j]), 0) ** 2 * x[j] for j in range(P))
        for k in range(P):
            diagonal = math.sqrt(2) * max(crop[2], other[2]) / side
            if math.dist(centre(crop, i), centre(other, k)) < 0.7 * diagonal:
                found.append(float(y @ t[k] / y.norm()))
    return sum(found) / max(len(found), 1), len(found)


def test_pixpro_equals_the_loop_over_patches():
    torch.manual_seed(2)
    x, t = unit(4, 9, 6), unit(4, 9, 6)
    crops = torch.tensor([[0.0, 0.0, 1.0], [0.1, 0.3, 0.6], [0.2, 0.2, 0.5], [0.0, 0.0, 0.45]])
    others = torch.tensor([[0.2, 0.4, 0.5], [0.3, 0.2, 0.7], [0.2, 0.2, 0.5],
                           [0.55, 0.55, 0.45]])
    ours = private("pixpro")._agreement(x, t, crops.double(), others.double())
    counts = []
    for i in range(4):
        expected, count = agreement_by_loops(x[i], t[i], crops[i].tolist(), others[i].tolist())
        assert ours[i].item() == pytest.approx(expected, abs=1e-9)
        counts.append(count)
    assert counts[0] and counts[1] and counts[3] == 0  # no common place: nothing to agree on


def test_in_identical_crops_a_patch_is_paired_with_itself_alone():
    x, t = torch.eye(16)[None], torch.eye(16)[None]  # orthogonal patches: y is x
    crop = torch.tensor([[0.1, 0.2, 0.7]])
    assert private("pixpro")._agreement(x, t, crop, crop).item() == 1
    shifted = t.roll(1, 1)
    assert private("pixpro")._agreement(x, shifted, crop, crop).item() == 0


def test_pixpro_shows_the_towers_what_its_crops_name():
    hooks, clip, seen = hooks_of("pixpro"), toy_clip(), []
    hooks.prepare_model(clip, None)
    clip.vision.register_forward_pre_hook(lambda tower, inputs: seen.append(inputs[0]))
    batch, config = toy_batch(2), settings(image_size=32)
    batch["crops"] = torch.tensor([[[0.0, 0.0, 1.0], [0.5, 0.25, 0.5]]]).expand(2, 2, 3)
    rows = hooks.encode(clip, batch, config)
    assert rows["agree"].shape == (2,) and seen[0].shape == (4, 3, 32, 32)
    assert torch.allclose(seen[0][:2], batch["views"], atol=1e-5)         # the whole view
    part = F.interpolate(batch["views"][:, :, 8:24, 16:], (32, 32), mode="bilinear")
    assert torch.allclose(seen[0][2:, :, 1:-1, 1:-1], part[:, :, 1:-1, 1:-1], atol=1e-5)


def test_both_directions_of_pixpro_count_and_weight_0_is_the_plain_loss():
    hooks, clip, seen = hooks_of("pixpro"), toy_clip(), []
    config = settings(image_size=32, weight=0.5)
    hooks.prepare_model(clip, config)
    clip.vision.projection.weight.data.mul_(1 + torch.rand_like(clip.vision.projection.weight))
    clip.vision.register_forward_pre_hook(lambda tower, inputs: seen.append(inputs[0]))
    batch = toy_batch(2)
    batch["crops"] = torch.tensor([[[0.0, 0.0, 1.0], [0.3, 0.1, 0.6]],
                                   [[0.2, 0.2, 0.5], [0.1, 0.3, 0.6]]])
    rows, views = hooks.encode(clip, batch, config), seen[0]
    x, t = (F.normalize(tower(views, every=True)[:, 1:], dim=2).detach()
            for tower in (clip.vision, clip.extra.teacher))
    for i, (one, two) in enumerate(batch["crops"].tolist()):
        there, _ = agreement_by_loops(x[i], t[2 + i], one, two)
        back, _ = agreement_by_loops(x[2 + i], t[i], two, one)
        assert rows["agree"][i].item() == pytest.approx(there + back, abs=1e-5)
    expected = plain(rows) - 0.5 * rows["agree"].mean().item()
    assert hooks.global_loss(rows, config, Ranks()).item() == pytest.approx(expected, rel=1e-6)
    off = hooks.global_loss(rows, settings(weight=0.0), Ranks())
    assert off.item() == plain(rows)


def test_pixpros_crops_lie_in_the_view(toy_pairs):
    pairs, _ = toy_pairs("pixpro")
    crops = pairs.__getitems__([(0, i) for i in range(200)])["crops"].flatten(0, 1)
    assert crops.min() >= 0 and (crops[:, :2] + crops[:, 2:]).max() <= 1 + 1e-6
    assert crops[:, 2].min() < 0.5 and crops[:, 2].max() > 0.95
    assert len(crops.unique(dim=0)) == 400


def test_pixpros_teacher_is_the_moving_average_of_the_tower():
    hooks, clip, config = hooks_of("pixpro"), toy_clip(), settings(momentum=0.9)
    hooks.prepare_model(clip, config)
    before = {name: tensor.clone() for name, tensor in clip.vision.state_dict().items()}
    for tensor in clip.vision.parameters():
        tensor.data.add_(torch.randn_like(tensor))
    clip.logit_scale.data.fill_(9.0)
    hooks.after_step(clip, 0, 10, config)
    now = clip.vision.state_dict()
    for name, tensor in clip.extra.teacher.state_dict().items():
        assert torch.allclose(tensor, 0.9 * before[name] + 0.1 * now[name], atol=1e-6)
    assert clip.logit_scale.item() == pytest.approx(math.log(100))
    assert not any(p.requires_grad for p in clip.extra.teacher.parameters())


# --------------------------------------------------------------------------------- slip, rocket

def test_slip_equals_the_loop_over_views_and_at_weight_0_the_plain_loss():
    rows, hooks = random_rows(5), hooks_of("slip")
    rows["strong"] = unit(5, 2, 8)
    views, total = rows["strong"].transpose(0, 1).flatten(0, 1), 0.0      # (10, 8)
    for i in range(10):
        others = [torch.exp(views[i] @ views[j] / 0.1) for j in range(10) if j != i]
        total -= torch.log(torch.exp(views[i] @ views[(i + 5) % 10] / 0.1) / sum(others))
    ours = hooks.global_loss(rows, settings(weight=0.5), Ranks()).item()
    assert ours == pytest.approx(plain(rows) + 0.5 * total.item() / 10, rel=1e-12)
    assert hooks.global_loss(rows, settings(weight=0.0), Ranks()).item() == plain(rows)
    rows["image"], rows["text"], rows["strong"] = unit(6, 8), unit(6, 8), unit(6, 2, 8)
    assert same_on_two_ranks(hooks, rows, settings(weight=0.5))


def test_slips_views_are_two_of_the_same_picture(toy_pairs):
    pairs, config = toy_pairs("slip")
    batch = pairs.__getitems__([(0, i) for i in range(4)])
    assert batch["strong"].shape == (4, 2, 3, 32, 32) and batch["strong"].dtype == torch.uint8
    assert batch["strong_draws"].shape == (4, 2, 11)
    assert not torch.equal(batch["strong"][:, 0], batch["strong"][:, 1])
    assert not torch.equal(batch["strong_draws"][:, 0], batch["strong_draws"][:, 1])
    hooks, clip, seen = hooks_of("slip"), toy_clip(), []
    hooks.prepare_model(clip, config)
    clip.vision.register_forward_pre_hook(lambda tower, inputs: seen.append(inputs[0]))
    rows = hooks.encode(clip, toy_batch() | batch | {"tokens": toy_batch()["tokens"]}, config)
    views = seen[0].unflatten(0, (4, 2))
    for i in range(4):
        for k in range(2):
            image, draws = batch["strong"][i, k], batch["strong_draws"][i, k]
            alone = pretrain.augment(image[None], draws[None], private("slip").STRONG)[0]
            assert torch.allclose(views[i, k], alone, atol=1e-5)
            row = F.normalize(clip.extra.head(clip.vision(alone[None])), dim=1)[0]
            assert torch.allclose(rows["strong"][i, k], row, atol=1e-5)


def rocket_rows(b=6):
    return random_rows(b) | {"strong": unit(b, 2, 8), "thinned": unit(b, 8),
                             "strong_scale": torch.tensor(3.0, dtype=torch.float64)}


def test_rocket_adds_the_smoothed_loss_of_both_views_and_at_weight_0_is_the_plain_loss():
    rows, hooks = rocket_rows(), hooks_of("rocket")
    expected = plain(rows)
    for view in range(2):
        strong = {"image": rows["strong"][:, view], "text": rows["thinned"], "scale": 3.0}
        expected += 0.5 * smoothed(strong, 0.1) / 2
    config = settings(weight=0.5, smoothing=0.1)
    assert hooks.global_loss(rows, config, Ranks()).item() == pytest.approx(expected, rel=1e-12)
    off = settings(weight=0.0, smoothing=0.1)
    assert hooks.global_loss(rows, off, Ranks()).item() == plain(rows)
    rows |= {"first": rows["strong"][:, 0], "second": rows["strong"][:, 1]}  # for gather
    assert same_on_two_ranks(hooks, rows, config)


def test_rockets_captions_lose_tokens_and_keep_their_order(toy_pairs):
    pairs, _ = toy_pairs("rocket", dropped=0.3)
    batch = pairs.__getitems__([(0, i) for i in range(100)])
    lost, whole = 0, 0
    for text, thinned in zip(batch["tokens"].tolist(), batch["thinned"].tolist()):
        rest = iter(text)
        assert all(token in rest for token in thinned if token)  # in the same order
        assert thinned[0] == text[0] and max(thinned) == max(text)
        whole += sum(token > 0 for token in text) - 2
        lost += sum(token > 0 for token in text) - sum(token > 0 for token in thinned)
    assert 0.25 < lost / whole < 0.35
    pairs, _ = toy_pairs("rocket", dropped=0.0)
    batch = pairs.__getitems__([(0, 0), (0, 1)])
    assert torch.equal(batch["tokens"], batch["thinned"])


def test_rocket_trains_heads_and_a_scale_of_its_own_and_caps_it(short_run, tmp_path):
    weights = short_run("rocket", tmp_path)
    assert not torch.equal(weights["extra.head.0.weight"], weights["extra.text_head.0.weight"])
    assert weights["extra.logit_scale"] != weights["logit_scale"]
    clip, config = toy_clip(), settings()
    hooks = hooks_of("rocket")
    hooks.prepare_model(clip, config)
    clip.extra.logit_scale.data.fill_(9.0)
    hooks.after_step(clip, 0, 10, config)
    assert clip.extra.logit_scale.item() == pytest.approx(math.log(100))
    assert clip.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


# ----------------------------------------------------------------------------------------- flip

def test_flip_of_all_patches_is_the_plain_encoding_to_the_bit():
    hooks, clip, batch = hooks_of("flip"), toy_clip(), toy_batch()
    batch["noise"] = torch.rand(4, 16)
    ours, plainly = (encode(clip, batch, settings(share=1.0))
                     for encode in (hooks.encode, pretrain.encode))
    for name in ("image", "text", "scale"):
        assert torch.equal(ours[name], plainly[name])


def test_flip_sees_the_patches_with_the_lowest_noise_and_no_other():
    hooks, clip, batch, config = hooks_of("flip"), toy_clip(), toy_batch(), settings(share=0.25)
    batch["noise"] = torch.rand(4, 16)
    kept = batch["noise"].argsort(1)[:, :4]
    before = hooks.encode(clip, batch, config)["image"]
    for patch in range(16):
        views = batch["views"].clone()
        down, right = 8 * (patch // 4), 8 * (patch % 4)
        views[:, :, down:down + 8, right:right + 8] += 1
        after = hooks.encode(clip, batch | {"views": views}, config)["image"]
        assert torch.equal((after != before).any(1), (kept == patch).any(1))


def test_flip_draws_patches_for_each_image_and_epoch(toy_pairs):
    pairs, _ = toy_pairs("flip")
    noise = [pairs.__getitems__([(epoch, i) for i in range(4)])["noise"] for epoch in (0, 0, 1)]
    assert noise[0].shape == (4, 16) and torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2]) and len(noise[0].unique()) == 64


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_flip_says_that_a_share_is_above_0_and_at_most_1(share):
    with pytest.raises(ValueError, match=f"share={share}: of the patches to keep"):
        hooks_of("flip").prepare_model(toy_clip(), settings(share=share))


# ------------------------------------------------------------------------------------- metaclip

class Words:
    """Shards of 6,000 pairs: token 1 is in all of them, 2 in the first 100, 3 in half."""

    def __len__(self):
        return 6_000

    def caption_count(self, i):
        return 1

    def ids(self, i, caption):
        return np.array([1] + [2] * (i < 100) + [3, 3] * (i % 2), np.uint16)


def test_metaclip_keeps_the_share_that_the_formula_says():
    chosen = hooks_of("metaclip").choose_pairs(Words(), settings(at_most=100, seed=0))
    assert set(range(100)) <= set(chosen.tolist())  # a rare word keeps all its pairs
    for odd, expected in ((0, 1 / 60), (1, 1 - (1 - 1 / 60) * (1 - 1 / 30))):
        share = np.mean(np.isin(np.arange(100 + odd, 6_000, 2), chosen))
        assert abs(share - expected) < 4 * (expected / 2_950) ** 0.5      # standard errors
    assert np.array_equal(chosen, np.unique(chosen))


def test_metaclip_chooses_by_the_seed_and_with_a_high_limit_all():
    choose = hooks_of("metaclip").choose_pairs
    one, again, other = (choose(Words(), settings(at_most=100, seed=i)) for i in (0, 0, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert len(choose(Words(), settings(at_most=6_000, seed=0))) == 6_000
    with pytest.raises(ValueError, match="at_most=0: must be 1 or more"):
        choose(Words(), settings(at_most=0, seed=0))


def test_metaclip_chooses_among_the_toy_worlds_pairs_by_all_their_captions(toy_pairs):
    pairs, config = toy_pairs("slip")
    config.at_most = 10
    chosen = hooks_of("metaclip").choose_pairs(pairs.shards, config)
    assert 100 < len(chosen) < 601
    assert private("metaclip")._entries(pairs.shards, 0).tolist() == sorted(
        set(pairs.shards.ids(0, 0).tolist()))
