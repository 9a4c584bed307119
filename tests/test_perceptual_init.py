"""perceptual_init.py: loss, accumulation, schedule, resume, the controls, and what goes wrong."""
import contextlib
import csv
import dataclasses
import json
import math
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import perceptual_init
import pretrain
from configs import load_config
from data.images import normalise
from data.text import Tokenizer
from data.triplets import Triplets
from evaluate import embed_triplets, two_afc
from model import (CLIP, FORMAT, SIZES, VisionTower, load_clip, load_vision, read_checkpoint,
                   write_checkpoint)
from perceptual_init import Config, triplet_loss

ROOT = pathlib.Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------ the loss


def unit(*degrees):
    """Unit vectors in the plane (n,2)."""
    angle = torch.tensor(degrees, dtype=torch.float32).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_loss_equals_values_computed_by_hand():
    """d = 1 - cos: 60 degrees 0.5, 90 degrees 1; margin 0.05."""
    ref, near, far = unit(0), unit(60), unit(90)
    right, left = torch.tensor([1]), torch.tensor([0])
    assert triplet_loss(ref, far, near, right, 0.05).item() == 0      # 0.05 - (1 - 0.5) < 0
    assert triplet_loss(ref, near, far, right, 0.05).item() == pytest.approx(0.55)
    assert triplet_loss(ref, near, far, left, 0.05).item() == 0
    assert triplet_loss(ref, far, near, right, 0.8).item() == pytest.approx(0.3)


def test_a_tie_costs_the_margin():
    ref, side = unit(0, 0), unit(70, 70)
    assert triplet_loss(ref, side, side, torch.tensor([0, 1]), 0.05).item() == pytest.approx(0.05)


def test_swapping_sides_and_votes_changes_nothing():
    ref, a, b = unit(0, 10, 20), unit(15, 80, 21), unit(60, 45, 22)
    all_left, all_right = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
    loss = triplet_loss(ref, a, b, all_left, 0.05)
    assert loss == triplet_loss(ref, b, a, all_right, 0.05)
    # by hand: cos 15 - cos 60 > 0.05; cos 70 against cos 35; cos 1 - cos 2 = 0.000457
    expected = (0 + 0.05 + math.cos(math.radians(35)) - math.cos(math.radians(70))
                + 0.05 - 0.000457) / 3
    assert loss.item() == pytest.approx(expected, abs=1e-6)


# ----------------------------------------------------------------- gradients and micro-batches


TINY = dataclasses.replace(SIZES["toy"], image_size=16, embed_dim=16, vision_width=16,
                           vision_layers=2, vision_heads=2)


def batch_of(count):
    """samples (B,3), images (B,3,3,16,16) uint8, labels (B,)."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.randint(2, (count,), generator=generator)
    return torch.arange(3 * count).view(count, 3), images, labels


def accumulated(micro, dtype="float32", count=12):
    """Gradients and (loss, 2AFC) of one step in micro-batches."""
    torch.manual_seed(0)
    tower = VisionTower(TINY)
    config = Config(batch_size=count, micro_batch=micro, margin=0.01, dtype=dtype)
    figures = perceptual_init.accumulate(tower, batch_of(count), 0, config, torch.device("cpu"))
    return {name: p.grad for name, p in tower.named_parameters()}, figures


def difference(ours, reference):
    """Of all parameters as one vector, relative."""
    ours, reference = (torch.cat([g[n].flatten() for n in reference]) for g in (ours, reference))
    return ((ours - reference).norm() / reference.norm()).item()


def test_gradient_is_autograd_of_the_written_out_formula():
    """The hinge, one triplet at a time, through torch's own cosine, in double precision."""
    torch.manual_seed(0)
    tower = VisionTower(TINY).double()
    _, images, labels = batch_of(12)
    losses = []
    for triplet, label in zip(images, labels):
        a, b, c = tower(normalise(triplet).double())
        d = [1 - F.cosine_similarity(a, side, dim=0) for side in (b, c)]
        y = 1 if label == 1 else -1
        losses.append(max(0 * d[0], 0.01 - y * (d[0] - d[1])))
    loss = sum(losses) / 12
    loss.backward()
    assert 2 < sum(one.item() > 0 for one in losses) < 12  # both branches of the hinge
    ours, (our_loss, _) = accumulated(0)
    assert difference(ours, {n: p.grad.float() for n, p in tower.named_parameters()}) < 1e-5  # fp32
    assert our_loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("micro", [1, 3, 5, 12])
def test_accumulated_gradient_is_the_one_pass_gradient(micro):
    (ours, figures), (reference, reference_figures) = accumulated(micro), accumulated(0)
    assert difference(ours, reference) < 1e-6
    assert figures == pytest.approx(reference_figures, rel=1e-6)


def test_distances_are_float32_under_bfloat16(monkeypatch):
    seen = []

    def loss(ref, left, right, labels, margin):
        seen.append([side.dtype for side in (ref, left, right)])
        return triplet_loss(ref, left, right, labels, margin)
    monkeypatch.setattr(perceptual_init, "triplet_loss", loss)
    gradients, _ = accumulated(4, "bfloat16")
    assert seen == [[torch.float32] * 3] * 3
    assert difference(gradients, accumulated(4, "float32")[0]) > 1e-3  # it was bfloat16 inside


# ------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("settings", [
    dict(lr=1.0, min_lr=0.1, warmup_steps=10), dict(lr=1.0, warmup_steps=0),
    dict(lr=1.0, min_lr=0.1, warmup_steps=10, decay="constant"), dict(lr=1.0, warmup_steps=200)])
def test_both_stages_have_one_schedule(settings):
    ours, theirs = Config(**settings), pretrain.Config(**settings)
    for step in range(100):
        rate = pretrain.lr_at(step, 100, theirs)
        assert perceptual_init.lr_at(step, 100, ours) == pytest.approx(rate)


def test_the_rate_peaks_after_warm_up_and_ends_at_its_minimum():
    config = Config(lr=1.0, min_lr=0.25, warmup_steps=10)
    rates = [perceptual_init.lr_at(step, 100, config) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 == max(rates) and rates[99] == 0.25


# ---------------------------------------------------------------------------- small whole runs


def draw_world(folder, count, seed=0):
    """Triplets that a random tower does not solve: the nearer image has the nearer step in tone.

    Each image has a colour of its own, which counts for nothing, and a step of -40..40 grey levels
    between its upper and lower half, which decides.
    """
    folder.mkdir()
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        steps = rng.uniform(-40, 40, 3)
        names = [f"{side}{i}.png" for side in ("ref", "left", "right")]
        for name, step in zip(names, steps):
            pixels = np.tile(rng.uniform(70, 185, 3), (16, 16, 1))           # (16,16,3)
            pixels[:8] += step
            pixels[8:] -= step
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
        label = int(abs(steps[0] - steps[2]) < abs(steps[0] - steps[1]))
        rows.append([*names, label, ("train", "train", "train", "val", "test")[i % 5]])
    with open(folder / "world.csv", "w", newline="") as file:
        csv.writer(file).writerows([["ref", "left", "right", "label", "split"], *rows])
    return folder / "world.csv"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """540 training, 180 validation and 180 test triplets."""
    return draw_world(tmp_path_factory.mktemp("world") / "w", 900)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """arguments(out_dir, *more) of a twelve-step run on 60 training triplets: about 0.3 s."""
    data = draw_world(tmp_path_factory.mktemp("small") / "w", 100)

    def build(out_dir, *more):
        return [f"--data={data}", f"--out_dir={out_dir}", *FAST, "--batch_size=12",
                "--max_steps=12", "--warmup_steps=2", "--log_every=1", "--save_every=2", *more]
    return build


FAST = ["--model=toy", "--image_size=16", "--lr=1e-3", "--dtype=float32", "--compile=False"]


@contextlib.contextmanager
def untouched():
    """Signal handlers, and functions that a recipe replaces, are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    functions = {name: getattr(perceptual_init, name)
                 for name in ("augment", "batch_loss", "lr_at", "triplet_loss")}
    try:
        yield
    finally:
        vars(perceptual_init).update(functions)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def here(argv):
    """perceptual_init.main in this process."""
    with untouched():
        perceptual_init.main(argv)


class Crash(BaseException):
    """What no one expects or catches."""


def crash(at, argv):
    """The same, broken off before update `at` without a chance to save."""
    def lr_or_crash(step, total_steps, config):
        if step == at:
            raise Crash
        return lr_at(step, total_steps, config)
    lr_at = perceptual_init.lr_at
    with untouched(), pytest.raises(Crash):
        perceptual_init.lr_at = lr_or_crash
        perceptual_init.main(argv)


def process(argv, code=None):
    """perceptual_init.py, or `code` with the same arguments, in a process of its own."""
    command = [sys.executable, *(["-c", code] if code else ["perceptual_init.py"])]
    return subprocess.Popen([*command, *map(str, argv)], cwd=ROOT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def log_of(out_dir):
    with open(out_dir / "log.jsonl") as file:
        return [json.loads(line) for line in file]


def trace(out_dir):
    """Every logged figure but the clock's."""
    return [{key: value for key, value in record.items()
             if key not in ("triplets_per_s", "data_wait")} for record in log_of(out_dir)]


def weights_of(path):
    return read_checkpoint(path)["weights"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


LEARN = [*FAST, "--batch_size=60", "--max_steps=45", "--warmup_steps=5", "--log_every=45"]


@pytest.fixture(scope="module")
def learnt(world, tmp_path_factory):
    """Folder of a run that saw the true votes."""
    out = tmp_path_factory.mktemp("learnt") / "run"
    here([f"--data={world}", f"--out_dir={out}", *LEARN])
    return out


def test_judgements_are_learnt_from_near_chance_to_15_points_above(learnt):
    """Of 180 triplets each: 3.7 points of standard error at chance."""
    first, last = log_of(learnt)[0], log_of(learnt)[-1]
    for split in ("val", "test"):
        assert abs(first[f"{split}_2afc"] - 0.5) < 0.11
        assert last[f"{split}_2afc"] > first[f"{split}_2afc"] + 0.15


def test_shuffled_votes_teach_nothing(world, tmp_path):
    """360 held-out triplets: three standard errors are 7.9 points."""
    here([f"--data={world}", f"--out_dir={tmp_path}", "--shuffle_votes=True", *LEARN])
    last = log_of(tmp_path)[-1]
    assert abs((last["val_2afc"] + last["test_2afc"]) / 2 - 0.5) < 0.079


def test_every_epoch_is_validated_and_the_best_is_kept(learnt):
    records = log_of(learnt)
    looked = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
    assert list(looked) == [0, 9, 18, 27, 36, 45]  # 540 triplets of 60
    best = read_checkpoint(learnt / "best.pt")
    trained = {step: loss for step, loss in looked.items() if step}
    assert best["step"] == min(trained, key=trained.get)
    assert best["best_loss"] == min(trained.values())
    assert read_checkpoint(learnt / "ckpt.pt")["step"] == 45


def test_the_logged_2afc_is_that_of_the_checkpoint(learnt, world):
    tower, test = load_vision(learnt / "ckpt.pt"), Triplets(world, "test")
    sides = embed_triplets(tower, test, 16, "cpu")
    score = two_afc(*sides, torch.from_numpy(test.labels)).mean().item()
    assert score == log_of(learnt)[-1]["test_2afc"]


def test_the_checkpoint_is_a_vision_tower_of_the_named_size(learnt):
    saved = read_checkpoint(learnt / "ckpt.pt")
    assert saved["kind"] == "vision" and saved["samples"] == 45 * 60
    assert saved["model"] == dataclasses.asdict(dataclasses.replace(SIZES["toy"], image_size=16))
    assert saved["weights"].keys() == VisionTower(SIZES["toy"]).state_dict().keys()


def test_micro_batches_give_the_same_run(arguments, tmp_path):
    for micro in (0, 5):
        here(arguments(tmp_path / str(micro), f"--micro_batch={micro}"))
    for whole, parts in zip(trace(tmp_path / "0"), trace(tmp_path / "5"), strict=True):
        # twelve steps of AdamW at most: fp32 rounding grows from 1e-7
        assert parts == pytest.approx(whole, rel=1e-4)


def test_compiled_towers_leave_no_trace_in_the_names(arguments, tmp_path):
    with torch.compiler.set_stance("force_eager"):  # the wrapper without minutes of compiling
        here(arguments(tmp_path / "compiled", "--compile=True"))
    here(arguments(tmp_path / "plain"))
    assert same(weights_of(tmp_path / "compiled/ckpt.pt"), weights_of(tmp_path / "plain/ckpt.pt"))


def test_fractions_train_on_fewer_triplets_and_validate_on_all(arguments, tmp_path, capsys):
    here(arguments(tmp_path, "--fraction=0.25"))
    assert "15 triplets for" in capsys.readouterr().out
    assert [r["step"] for r in log_of(tmp_path) if "val_loss" in r] == list(range(13))  # 15 // 12


def test_shares_and_shuffles_follow_the_seed_of_the_run(world, tmp_path):
    here([f"--data={world}", f"--out_dir={tmp_path}", *FAST, "--batch_size=60", "--max_steps=1",
          "--fraction=0.5", "--shuffle_votes=True", "--seed=7"])
    train = Triplets(world, "train", fraction=0.5, shuffle_votes=True, seed=7)
    assert read_checkpoint(tmp_path / "ckpt.pt")["data"].startswith(train.fingerprint)


def test_an_epoch_is_as_many_steps_as_whole_batches(arguments, tmp_path):
    """Of 60 triplets each epoch has one batch of 40; three epochs would hold four."""
    here(arguments(tmp_path, "--max_steps=0", "--epochs=3", "--batch_size=40"))
    assert log_of(tmp_path)[-1]["step"] == 3


def test_another_seed_starts_from_another_tower():
    towers = [perceptual_init.build(Config(model="toy", image_size=16, seed=seed), "cpu")[1]
              for seed in (1, 2)]
    assert not torch.equal(towers[0].projection.weight, towers[1].projection.weight)


def test_min_votes_counts_in_every_split(tmp_path):
    data = draw_world(tmp_path / "w", 40)
    lines = data.read_text().splitlines()
    votes = ["votes", *(str(3 + i // 20) for i in range(40))]  # half of each split has 3, half 4
    data.write_text("\n".join(f"{line},{cell}" for line, cell in zip(lines, votes)) + "\n")
    for least in (3, 4):
        here([f"--data={data}", f"--out_dir={tmp_path / str(least)}", *FAST, "--batch_size=12",
              "--max_steps=1", f"--min_votes={least}"])
        prints = [Triplets(data, split, least).fingerprint for split in ("train", "val", "test")]
        assert read_checkpoint(tmp_path / str(least) / "ckpt.pt")["data"] == "-".join(prints)


def test_the_first_moment_is_that_of_the_clipped_gradient(arguments, tmp_path):
    here(arguments(tmp_path, "--max_steps=1", "--beta1=0.9", "--grad_clip=0.01"))
    moments = read_checkpoint(tmp_path / "ckpt.pt")["optimizer"]["state"].values()
    norm = sum(moment["exp_avg"].square().sum().item() for moment in moments) ** 0.5
    assert log_of(tmp_path)[-1]["grad_norm"] > 0.01  # as it was before
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_betas_and_eps_are_the_settings(arguments, tmp_path):
    here(arguments(tmp_path, "--max_steps=1", "--beta1=0.8", "--beta2=0.95", "--eps=1e-6"))
    for group in read_checkpoint(tmp_path / "ckpt.pt")["optimizer"]["param_groups"]:
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.95), 1e-6)


def test_the_loss_of_held_out_triplets_has_the_margin_of_the_settings(arguments, tmp_path):
    argv = arguments(tmp_path, "--max_steps=1", "--margin=0.3")
    here(argv)
    val = Triplets(argv[0].removeprefix("--data="), "val")
    ref, left, right = embed_triplets(load_vision(tmp_path / "ckpt.pt"), val, 16, "cpu")
    lead = (ref * right).sum(1) - (ref * left).sum(1)  # of the right side
    hinges = [max(0.0, 0.3 - (own if label else -own))
              for own, label in zip(lead.tolist(), val.labels)]
    assert log_of(tmp_path)[-1]["val_loss"] == pytest.approx(np.mean(hinges), rel=1e-5)


def test_augmentation_is_told_the_epoch_and_every_image_of_it(arguments, tmp_path, monkeypatch):
    seen = []

    def augment(images, samples, epoch, seed):
        seen.append((epoch, seed, samples.tolist()))
        return normalise(images)
    monkeypatch.setattr(perceptual_init, "augment", augment)
    here(arguments(tmp_path))  # 60 triplets of 12: five steps an epoch
    assert [epoch for epoch, _, _ in seen] == [0] * 5 + [1] * 5 + [2] * 2
    assert {seed for _, seed, _ in seen} == {Config().seed}
    first = [sample for _, _, samples in seen[:5] for sample in samples]
    assert first != sorted(first) == list(range(180))


# --------------------------------------------------------------------- stopping and going on


KILL = '''
import os, signal, sys, model, perceptual_init
point, at = sys.argv.pop(1), int(sys.argv.pop(1))
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
lr_at, write, replace = perceptual_init.lr_at, perceptual_init.write_checkpoint, os.replace
def lr_or_die(step, total_steps, config):
    return die() if point == "step" and step == at else lr_at(step, total_steps, config)
def renamed(*args):
    replace(*args); die()
def write_and_die(path, content):
    if content["step"] == at and path.name == point.split()[0]:
        if point.endswith("written"): model.os.fsync = die
        if point.endswith("renamed"): model.os.replace = renamed
    return write(path, content)
perceptual_init.lr_at, perceptual_init.write_checkpoint = lr_or_die, write_and_die
perceptual_init.main(sys.argv[1:])
'''


def test_run_killed_again_and_again_equals_one_never_interrupted(arguments, tmp_path):
    """Between saves, inside one, and between the two files of an epoch's end."""
    here(arguments(tmp_path / "whole"))
    for point, at in [("step", 3), ("ckpt.pt written", 4), ("best.pt renamed", 5)]:
        killed = process([point, at, *arguments(tmp_path / "cut")], KILL)
        output = killed.communicate(timeout=60)[0]
        assert killed.returncode == -signal.SIGKILL, output
    here(arguments(tmp_path / "cut"))
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    for name in ("ckpt.pt", "best.pt"):
        assert same(weights_of(tmp_path / "cut" / name), weights_of(tmp_path / "whole" / name))


def test_sigterm_finishes_the_step_saves_and_exits_0(arguments, tmp_path):
    argv = arguments(tmp_path, "--max_steps=100000", "--save_every=100000", "--log_every=1")
    run = process(argv)
    deadline = time.time() + 60
    while time.time() < deadline and run.poll() is None:
        if (tmp_path / "log.jsonl").exists() and len(log_of(tmp_path)) > 3:
            break
        time.sleep(0.05)
    run.terminate()
    output = run.communicate(timeout=60)[0]
    assert run.returncode == 0, output
    step = read_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert log_of(tmp_path)[-1]["step"] == step > 0
    assert f"step {step} of 100,000" in output.splitlines()[-1]


def test_a_finished_run_started_again_changes_nothing(arguments, tmp_path):
    here(arguments(tmp_path))
    before, weights = trace(tmp_path), weights_of(tmp_path / "ckpt.pt")
    here(arguments(tmp_path))
    assert trace(tmp_path) == before and same(weights_of(tmp_path / "ckpt.pt"), weights)


def test_a_run_that_goes_on_knows_its_best_loss(arguments, tmp_path):
    here(arguments(tmp_path, "--max_steps=5"))
    content = read_checkpoint(tmp_path / "ckpt.pt")
    write_checkpoint(tmp_path / "ckpt.pt", content | {"best_loss": 0.0})  # no loss is lower
    here(arguments(tmp_path, "--max_steps=10", "--change=max_steps"))
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 5
    assert read_checkpoint(tmp_path / "ckpt.pt")["best_loss"] == 0.0


def test_other_settings_on_resume_are_refused_with_key_and_both_values(arguments, tmp_path):
    here(arguments(tmp_path))
    with pytest.raises(ValueError, match="margin was 0.05 in the checkpoint, is 0.1 now"):
        here(arguments(tmp_path, "--margin=0.1"))


def test_a_change_that_the_message_advises_is_accepted_and_remembered(arguments, tmp_path):
    here(arguments(tmp_path, "--max_steps=2"))
    with pytest.raises(ValueError, match="accept the change by --change=lr"):
        here(arguments(tmp_path, "--max_steps=3", "--lr=1e-4", "--change=max_steps"))
    here(arguments(tmp_path, "--max_steps=3", "--lr=1e-4", "--weight_decay=0.5",
                   "--change=lr,max_steps,weight_decay"))
    saved = read_checkpoint(tmp_path / "ckpt.pt")
    assert saved["step"] == 3 and saved["config"]["lr"] == 1e-4
    assert saved["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    assert "lr was " in (tmp_path / "record/command.txt").read_text().splitlines()[-1]


def test_other_votes_on_resume_are_refused(arguments, tmp_path):
    data = draw_world(tmp_path / "w", 40)
    here(arguments(tmp_path / "run", f"--data={data}"))
    lines = data.read_text().splitlines()
    cells = lines[1].split(",")
    lines[1] = ",".join([*cells[:3], "10"[int(cells[3])], cells[4]])
    data.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="cannot resume: triplets was"):
        here(arguments(tmp_path / "run", f"--data={data}"))


def test_starting_anew_needs_an_empty_folder(arguments, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="resume=False: .* is not empty"):
        here(arguments(tmp_path, "--resume=False"))


# -------------------------------------------------------------------------- post-hoc control


@pytest.fixture(scope="module")
def clip_file(toy_world, tmp_path_factory):
    """An untrained CLIP of the toy size for images of 16 pixels, with the toy's vocabulary."""
    tokenizer = Tokenizer(toy_world / "vocabulary/toy.tiktoken")
    config = dataclasses.replace(SIZES["toy"], image_size=16, vocab_size=tokenizer.size)
    torch.manual_seed(3)
    clip = CLIP(config)
    path = tmp_path_factory.mktemp("clip") / "ckpt.pt"
    write_checkpoint(path, {
        "format": FORMAT, "kind": "clip", "model": dataclasses.asdict(config), "config": {},
        "weights": clip.state_dict(), "optimizer": None, "step": 10, "samples": 640, "data": "",
        "vocabulary": tokenizer.text})
    return path


@pytest.mark.parametrize("train", ["qkv", "all"])
def test_post_hoc_trains_what_is_named_and_leaves_the_rest_bit_equal(arguments, tmp_path, clip_file,
                                                                     train):
    here(arguments(tmp_path, f"--init={clip_file}", f"--train={train}", "--weight_decay=0.0"))
    before, after = weights_of(clip_file), weights_of(tmp_path / "ckpt.pt")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    vision = {name for name in before if name.startswith("vision.")}
    qkv = {f"vision.blocks.{i}.qkv.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert changed == (qkv if train == "qkv" else vision)
    assert before.keys() == after.keys()


def test_post_hoc_saves_a_whole_clip_with_its_vocabulary_and_pairs_seen(arguments, tmp_path,
                                                                        clip_file):
    here(arguments(tmp_path, f"--init={clip_file}", "--train=qkv"))
    clip = load_clip(tmp_path / "ckpt.pt")
    assert clip.vocabulary == load_clip(clip_file).vocabulary
    assert clip.info["samples"] == 640
    tokens = Tokenizer(clip.vocabulary)(["a red circle"], 32)
    assert torch.equal(clip.encode_text(tokens), load_clip(clip_file).encode_text(tokens))


def test_post_hoc_logs_zero_shot_before_and_after(arguments, tmp_path, clip_file, toy_world):
    folder = tmp_path / "sets"
    folder.mkdir()
    (folder / "wds_toy_color_test").symlink_to(toy_world / "benchmarks/wds_toy_color_test")
    here(arguments(tmp_path / "run", f"--init={clip_file}", f"--benchmarks={folder}"))
    records = [r for r in log_of(tmp_path / "run") if "zero_shot/toy_color" in r]
    assert [r["step"] for r in records] == [0, 12]
    assert all(0 <= r["zero_shot/toy_color"] <= 1 for r in records)


def test_post_hoc_resumes_bit_for_bit(arguments, tmp_path, clip_file):
    argv = [f"--init={clip_file}", "--train=qkv"]
    here(arguments(tmp_path / "whole", *argv))
    crash(5, arguments(tmp_path / "cut", *argv))
    assert read_checkpoint(tmp_path / "cut/ckpt.pt")["step"] == 4
    here(arguments(tmp_path / "cut", *argv))
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")


# ------------------------------------------------------------------------ when things go wrong


@pytest.mark.parametrize("argument, message", [
    ("--batch_size=61", "batch_size=61: only 60 training triplets"),
    ("--batch_size=0", "batch_size=0: must be above 0"),
    ("--margin=-0.1", "margin=-0.1: must be 0 or more"),
    ("--train=text", "train='text': must be one of 'all', 'qkv'"),
    ("--model=ViT-B-33", "model='ViT-B-33': must be one of 'ViT-B-32'"),
    ("--fraction=1.5", "fraction=1.5: must be above 0 and at most 1"),
    ("--data=nowhere", "nowhere: no such file; give a NIGHTS folder"),
    ("--min_votes=-1", "min_votes=-1: must be 0 or more"),
    ("--benchmarks=data", "benchmarks=data: zero-shot needs a CLIP; set init"),
    ("--init=nowhere.pt", "nowhere.pt: no such file"),
    ("--epoch=3", "did you mean epochs"),
    ("ckpt.pt", "ckpt.pt: is one argument too many")])
def test_bad_settings_are_one_line_and_leave_nothing(arguments, tmp_path, argument, message):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        here(arguments(tmp_path / "run", argument))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_clip_of_another_size_is_refused(arguments, tmp_path, clip_file):
    with pytest.raises(ValueError, match="its image_size is not 32 as here"):
        here(arguments(tmp_path / "run", f"--init={clip_file}", "--image_size=32"))


def test_zero_shot_needs_a_clip_with_its_vocabulary(arguments, tmp_path, clip_file):
    content = read_checkpoint(clip_file) | {"vocabulary": None}
    write_checkpoint(tmp_path / "bare.pt", content)
    with pytest.raises(ValueError, match="bare.pt has no vocabulary"):
        here(arguments(tmp_path / "run", f"--init={tmp_path / 'bare.pt'}", "--benchmarks=data"))


def test_a_lone_vision_tower_cannot_be_fine_tuned_afterwards(arguments, tmp_path, learnt):
    with pytest.raises(ValueError, match="a whole CLIP is needed"):
        here(arguments(tmp_path / "run", f"--init={learnt / 'ckpt.pt'}"))


def test_more_than_one_rank_is_refused(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="trains on one device; start it without torchrun"):
        here(arguments(tmp_path / "run"))


def test_the_script_ends_bad_input_with_one_line_and_exit_2(tmp_path):
    run = process([f"--data={tmp_path}", *FAST])
    output = run.communicate(timeout=60)[0]
    assert run.returncode == 2 and output.count("\n") == 1 and "data.csv: no such file" in output


def test_five_steps_without_a_finite_gradient_stop_it(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(perceptual_init, "triplet_loss", lambda *a: triplet_loss(*a) * math.nan)
    with pytest.raises(ValueError, match="five steps in a row without a finite gradient"):
        here(arguments(tmp_path))
    assert capsys.readouterr().out.count("skipped: loss nan") == 5


def test_a_good_step_begins_the_count_of_bad_ones_anew(arguments, tmp_path, monkeypatch, capsys):
    def spoilt(ref, left, right, labels, margin):
        calls.extend([1] * ref.requires_grad)
        factor = math.nan if ref.requires_grad and len(calls) != 5 else 1
        return triplet_loss(ref, left, right, labels, margin) * factor
    calls = []
    monkeypatch.setattr(perceptual_init, "triplet_loss", spoilt)
    here(arguments(tmp_path, "--max_steps=9"))
    assert capsys.readouterr().out.count("skipped: loss nan") == 8


def test_a_step_without_a_finite_gradient_is_skipped_and_named(arguments, tmp_path, monkeypatch,
                                                               capsys):
    def once(ref, left, right, labels, margin):
        factor = math.nan if len(calls) == 0 and ref.requires_grad else 1
        calls.extend([1] * ref.requires_grad)
        return triplet_loss(ref, left, right, labels, margin) * factor
    calls = []
    monkeypatch.setattr(perceptual_init, "triplet_loss", once)
    here(arguments(tmp_path, "--log_every=12"))
    assert "step 1 skipped" in (out := capsys.readouterr().out) and "triplets of ref" in out
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path / "ckpt.pt").values())


def test_a_full_disk_is_a_warning_and_the_run_goes_on(arguments, tmp_path, monkeypatch, capsys):
    def full(path, content):
        if content["step"] < 12:
            raise OSError(28, "No space left on device")
        write_checkpoint(path, content)
    monkeypatch.setattr(perceptual_init, "write_checkpoint", full)
    here(arguments(tmp_path))
    assert "not written ([Errno 28] No space left on device); the run" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "ckpt.pt")["step"] == 12


# ------------------------------------------------------------------------------------- recipes


RECIPES = ["nights", "nights_10pct", "nights_shuffled", "nights_posthoc", "things", "toy_nights",
           "toy_nights_10pct", "toy_nights_50pct", "toy_nights_shuffled", "toy_posthoc"]


def resolved(*argv):
    """Config of a recipe, its parents read anew as in a fresh process."""
    for name in [name for name in sys.modules if name.startswith("configs.")]:
        del sys.modules[name]
    with untouched():
        return load_config(Config, vars(perceptual_init), argv)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_resolve_and_write_to_own(name):
    configs = {other: resolved(f"configs/{other}.py") for other in RECIPES}
    assert [c.out_dir for c in configs.values()].count(configs[name].out_dir) == 1


def test_nights_is_the_papers_recipe():
    config = resolved("configs/nights.py")
    assert (config.lr, config.weight_decay, config.beta1, config.beta2, config.eps, config.epochs,
            config.warmup_steps, config.batch_size, config.margin, config.seed, config.min_votes
            ) == (5e-4, 0.1, 0.9, 0.98, 1e-8, 32, 150, 768, 0.05, 42, 6)
    assert 13_900 // config.batch_size * config.epochs == 576


@pytest.mark.parametrize("model, warmup",
                         [("ViT-B-16", 150), ("ViT-L-14", 150), ("ViT-H-14", 2500)])
def test_nights_takes_every_size(model, warmup):
    config = resolved("configs/nights.py", f"--model={model}")
    assert (config.warmup_steps, config.out_dir) == (warmup, f"out/nights_{model}")
    assert 0 < config.micro_batch < config.batch_size


def test_a_twentieth_of_nights_fills_its_batches():
    config = resolved("configs/nights_10pct.py", "--fraction=0.05")
    assert config.batch_size <= round(13_900 * 0.05)


@pytest.mark.parametrize("name", ["toy_nights_10pct", "toy_nights_50pct", "toy_nights_shuffled"])
def test_toy_arms_differ_from_toy_nights_in_one_setting(name):
    plain, arm = (dataclasses.asdict(resolved(f"configs/{n}.py")) for n in ("toy_nights", name))
    changed = {key for key in plain if plain[key] != arm[key]} - {"out_dir"}
    assert changed == ({"shuffle_votes"} if name.endswith("shuffled") else {"fraction"})


def test_things_draws_for_each_image_whatever_its_micro_batch():
    augment = runpy.run_path("configs/things.py")["augment"]
    _, images, _ = batch_of(4)
    images, samples = images.flatten(0, 1), torch.arange(12)                 # (12,3,16,16), (12,)
    whole = augment(images, samples, 3, 42)
    parts = torch.cat([augment(images[i:i + 5], samples[i:i + 5], 3, 42) for i in (0, 5, 10)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, augment(images, samples, 4, 42))


def test_things_trains_augmented_and_resumes_bit_for_bit(arguments, tmp_path):
    argv = ["configs/things.py", "--micro_batch=5"]
    here(arguments(tmp_path / "whole", *argv))
    crash(5, arguments(tmp_path / "cut", *argv))
    here(arguments(tmp_path / "cut", *argv))
    here(arguments(tmp_path / "plain", "--micro_batch=5"))
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole") != trace(tmp_path / "plain")


SAME_PICTURES = str(ROOT / "configs/ideas/same_pictures.py")


def test_a_recipe_trains_on_the_same_pictures_without_judgements(arguments, tmp_path):
    here(arguments(tmp_path / "plain", SAME_PICTURES))
    here(arguments(tmp_path / "shuffled", SAME_PICTURES, "--shuffle_votes=True"))
    plain, shuffled = (weights_of(tmp_path / run / "ckpt.pt") for run in ("plain", "shuffled"))
    assert same(plain, shuffled)  # no vote is looked at
    losses = [record["loss"] for record in log_of(tmp_path / "plain") if "loss" in record]
    assert losses[-1] < losses[0]


def test_a_replaced_batch_loss_accumulates_and_resumes_exactly(arguments, tmp_path):
    for micro in (0, 5):
        here(arguments(tmp_path / str(micro), SAME_PICTURES, f"--micro_batch={micro}"))
    for whole, parts in zip(trace(tmp_path / "0"), trace(tmp_path / "5"), strict=True):
        # twelve steps of AdamW at most: fp32 rounding grows from 1e-7
        assert parts == pytest.approx(whole, rel=1e-3)
    crash(5, arguments(tmp_path / "cut", SAME_PICTURES))
    here(arguments(tmp_path / "cut", SAME_PICTURES))
    assert trace(tmp_path / "cut") == trace(tmp_path / "0")


def test_a_run_without_its_recipe_is_another_run(arguments, tmp_path):
    here(arguments(tmp_path, SAME_PICTURES, "--max_steps=2"))
    with pytest.raises(ValueError, match="cannot resume: hooks was .*same_pictures"):
        here(arguments(tmp_path, "--max_steps=2"))


def test_a_finished_run_says_that_it_was_complete(arguments, tmp_path, capsys):
    here(arguments(tmp_path))
    assert "val_2afc" in capsys.readouterr().out.splitlines()[-1]
    here(arguments(tmp_path))
    assert "step 12 of 12, 144 samples; was complete;" in capsys.readouterr().out.splitlines()[-1]
