"""Facts of the ideas that add parts to the towers, and of the controls."""
import dataclasses
import types

import pytest
import torch
import torch.nn.functional as F

import perceptual_init
import pretrain
from configs import load_config
from data.ranks import Ranks
from model import CLIP, FORMAT, SIZES, VisionTower, flops_per_pair, write_checkpoint
from tests.test_ideas import ROOT, hooks_of, random_rows

SMALL = dataclasses.replace(SIZES["toy"], vocab_size=50)


def prepared(idea, **settings):
    """(a small CLIP as the idea prepares it, its hooks, its module, its config)."""
    options = [f"--{name}={value}" for name, value in settings.items()]
    path = str(ROOT / f"configs/ideas/{idea}.py")
    config, _ = load_config(pretrain.Config, vars(pretrain), [path, "--model=toy", *options])
    hooks = hooks_of(idea)
    module = __import__(f"configs.ideas.{idea}", fromlist=["_"])
    torch.manual_seed(0)
    clip = CLIP(SMALL)
    hooks.prepare_model(clip, config)
    return clip, hooks, module, config


# -------------------------------------------------------------------------------------- controls


def test_permuting_keeps_each_tensors_values_and_the_text_tower():
    clip = prepared("permuted_init", init_vision="tower")[0]
    torch.manual_seed(0)
    before, moved = CLIP(SMALL).state_dict(), 0
    for name, after in clip.state_dict().items():
        ours, theirs = after.flatten(), before[name].flatten()
        if not name.startswith("vision."):
            assert torch.equal(ours, theirs), name
        assert torch.equal(ours.sort().values, theirs.sort().values), name
        moved += int((ours != theirs).sum())
    assert moved > 0.9 * sum(p.numel() for p in clip.vision.blocks.parameters() if p.ndim > 1)


def test_the_permutation_follows_the_seed():
    first, again = (prepared("permuted_init", init_vision="tower")[0] for _ in range(2))
    other = prepared("permuted_init", init_vision="tower", seed=7)[0]
    ours, same, else_ = (clip.vision.projection.weight for clip in (first, again, other))
    assert torch.equal(ours, same) and not torch.equal(ours, else_)


def test_permuting_needs_a_tower():
    with pytest.raises(ValueError, match="set init_vision"):
        prepared("permuted_init")


@pytest.mark.parametrize("setting", ["init", "init_vision"])
def test_mimetic_weights_need_no_other(setting):
    with pytest.raises(ValueError, match="leave out init and init_vision"):
        prepared("mimetic_init", **{setting: "tower"})


def test_mimetic_values_times_projection_are_the_target():
    """Without noise minus 0.4 of the identity; with it the rest is normal, of 0.4 / sqrt(D)."""
    clip = prepared("mimetic_init", value_noise=0.0)[0]
    for block in clip.vision.blocks:
        product = block.out.weight @ block.qkv.weight[192:]                        # (D, D)
        assert torch.allclose(product, -0.4 * torch.eye(96), atol=1e-5)
    clip = prepared("mimetic_init")[0]
    block = clip.vision.blocks[0]
    rest = (block.out.weight @ block.qkv.weight[192:] + 0.4 * torch.eye(96)) * 96 ** 0.5 / 0.4
    assert rest.std().item() == pytest.approx(1, abs=0.03)      # of 9,216 draws
    assert rest.mean().item() == pytest.approx(0, abs=0.03)


def test_mimetic_queries_times_keys_are_the_best_of_their_rank():
    """Eckart and Young: nothing of rank d is nearer to a head's target than its largest d."""
    _, _, mimetic, config = prepared("mimetic_init")
    left, right = mimetic._factors(96, 0.7, 0.7, torch.Generator().manual_seed(config.seed))
    target = left @ right                                                          # (D, D)
    clip = prepared("mimetic_init")[0]
    q, k = clip.vision.blocks[0].qkv.weight[:192].chunk(2)                         # (D, D) each
    ours = q[:32].T @ k[:32]                                    # of the first head
    u, s, v = torch.linalg.svd(target)
    assert torch.allclose(ours, u[:, :32] * s[:32] @ v[:32], atol=1e-4)
    assert (target - ours).norm().item() == pytest.approx(s[32:].norm().item(), rel=1e-4)
    assert torch.linalg.matrix_rank(ours).item() == 32
    assert not torch.allclose(q[:32], q[32:64])                 # heads draw their own noise


def test_mimetic_leaves_the_text_tower_alone():
    clip = prepared("mimetic_init")[0]
    torch.manual_seed(0)
    for name, before in CLIP(SMALL).text.state_dict().items():
        assert torch.equal(clip.text.state_dict()[name], before), name


class Captions:
    """Shards of 100 pairs whose captions have 8 words."""

    def __len__(self):
        return 100

    def ids(self, pair, caption):
        return list(range(8))


def stage_1(tmp_path, samples, kind="vision"):
    size = dataclasses.replace(SIZES["toy"], vocab_size=0)
    path = tmp_path / "ckpt.pt"
    write_checkpoint(path, {"format": FORMAT, "kind": kind, "model": dataclasses.asdict(size),
                            "weights": {}, "samples": samples})
    return path


def test_longer_baseline_spends_what_stage_1_spent(tmp_path):
    """Counted by hand for the toy: 17 tokens of width 96, 16 patches of 192, 10 words."""
    vision = 3 * 17 * (24 * 96 ** 2 + 4 * 96 * 17) + 2 * 16 * 192 * 96 + 2 * 96 * 64
    text = 3 * 10 * (24 * 96 ** 2 + 4 * 96 * 10) + 2 * 96 * 64
    extra = 38_400 * 3 * vision / (20 * (vision + text))
    path = str(ROOT / "configs/ideas/longer_baseline.py")
    for options, steps in (["--max_steps=50"], 50), (["--epochs=3"], 15):
        config, _ = load_config(pretrain.Config, vars(pretrain), [
            path, "--model=toy", "--image_size=32", "--batch_size=20",
            f"--stage_1={stage_1(tmp_path, 38_400)}", *options])
        assert pretrain.choose_pairs(Captions(), config) == range(100)
        assert 0 <= config.max_steps - (steps + extra) < 1
    spent = config.max_steps - 15                                   # never less than stage 1
    assert spent * 20 * flops_per_pair(SIZES["toy"], 10) >= 38_400 * 3 * 3 * vision


def test_longer_baseline_needs_a_tower_of_stage_1(tmp_path):
    path = str(ROOT / "configs/ideas/longer_baseline.py")
    for stage, error in ((stage_1(tmp_path, 1, "clip"), ValueError),
                         (tmp_path / "none.pt", FileNotFoundError)):
        config, _ = load_config(pretrain.Config, vars(pretrain),
                                [path, "--model=toy", f"--stage_1={stage}"])
        with pytest.raises(error, match=stage.name):
            pretrain.choose_pairs(Captions(), config)


# --------------------------------------------------------------------------- same pictures, stage 1


@pytest.fixture
def same_pictures():
    config, _ = load_config(perceptual_init.Config, vars(perceptual_init), [
        str(ROOT / "configs/ideas/same_pictures.py"), "--dtype=float32", "--margin=0.5"])
    yield config
    load_config(perceptual_init.Config, vars(perceptual_init), [])


def test_same_pictures_loss_is_the_hinge_on_a_second_view(same_pictures):
    """One triplet at a time, each view drawn by itself, through torch's own cosine."""
    torch.manual_seed(0)
    tower = VisionTower(dataclasses.replace(SIZES["toy"], image_size=16))
    images = torch.randint(256, (4, 3, 3, 16, 16), dtype=torch.uint8)
    samples = torch.arange(12).view(4, 3)
    loss, score = perceptual_init.batch_loss(tower, samples, images, torch.zeros(4), 0,
                                             same_pictures)
    losses, hits = [], []
    for triplet, numbers in zip(images, samples.tolist()):
        numbers.append(numbers[0] + 2 ** 40)
        pictures = [triplet[0], triplet[1], triplet[2], triplet[0]]
        views = []
        for picture, number in zip(pictures, numbers):
            view = perceptual_init.augment(picture[None], torch.tensor([number]), 0, 42)
            views.append(tower(view)[0])
        ref, left, right, again = views
        assert not torch.equal(ref, again)
        own = 1 - F.cosine_similarity(ref, again, dim=0)
        d_left, d_right = (1 - F.cosine_similarity(ref, side, dim=0) for side in (left, right))
        losses += [F.relu(0.5 - (d_left - own)), F.relu(0.5 - (d_right - own))]
        hits.append(float(d_left < d_right))
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert score.item() == pytest.approx(sum(hits) / 4)             # all labels say left
