"""Facts of the ideas that add parts to the towers, and of the controls."""
import dataclasses
import itertools
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


def a_batch(b=4, seed=1):
    """views (b, 3, 32, 32), tokens (b, 32) of captions of different lengths, noise (b, 16)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(b, 32, dtype=torch.int64)
    for row in range(b):
        length = 3 + 2 * row
        tokens[row, 1:length] = torch.randint(48, (length - 1,), generator=generator)
        tokens[row, 0], tokens[row, length] = 48, 49
    return {"views": torch.randn(b, 3, 32, 32, generator=generator), "tokens": tokens,
            "noise": torch.rand(b, 16, generator=generator)}


# ------------------------------------------------------------------------------------------ fdt


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    """Against the best of all supports, each solved by itself (Martins and Astudillo 2016)."""
    _, _, fdt, _ = prepared("fdt")
    scores = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = fdt._sparsemax(scores)
    assert torch.allclose(weights.sum(1), torch.ones(8, dtype=torch.float64), atol=1e-12)
    assert (weights >= 0).all() and (weights == 0).any()
    for row, ours in zip(scores, weights):
        candidates = []
        for size in range(1, 6):
            for support in itertools.combinations(range(5), size):
                point = torch.zeros(5, dtype=torch.float64)
                kept = list(support)
                point[kept] = row[kept] - (row[kept].sum() - 1) / size
                if (point >= 0).all():
                    candidates.append(point)
        nearest = min(candidates, key=lambda point: (point - row).square().sum().item())
        assert torch.allclose(ours, nearest, atol=1e-12)


def test_gradient_of_sparsemax_is_right():
    _, _, fdt, _ = prepared("fdt")
    scores = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(fdt._sparsemax, scores.requires_grad_())


def test_fdt_takes_each_codes_best_token_and_no_padding():
    """The weights, token by token in a loop; a caption's do not depend on its neighbours."""
    clip, _, fdt, _ = prepared("fdt", codes=7, temperature=2)
    clip.text.query[-1].bias.data.fill_(1)
    clip.codebook.data.abs_().neg_()  # all scores are negative: padding, at 0, would win
    batch = a_batch()
    ours = clip.encode_text(batch["tokens"])                                       # (b, E)
    assert torch.allclose(ours.norm(dim=1), torch.ones(4), atol=1e-6)
    for row, ids in enumerate(batch["tokens"]):
        alone = clip.text(ids[None, :int(ids.argmax()) + 1], every=True)[0]        # (T, E)
        best = []
        for code in clip.codebook:
            best.append(max(clip.text.query(token) @ code for token in alone))
        weights = fdt._sparsemax(torch.stack(best)[None] / (2 * 64 ** 0.5))
        expected = F.normalize(weights @ clip.codebook, dim=1)[0]
        assert torch.allclose(ours[row], expected, atol=1e-5)


def test_fdt_writes_pictures_and_captions_in_the_same_codes():
    clip, hooks, _, config = prepared("fdt", codes=7)
    rows = hooks.encode(clip, a_batch(), config)
    rows["image"].sum().backward()
    of_images = clip.codebook.grad.clone()
    assert of_images.abs().sum() > 0
    rows = hooks.encode(clip, a_batch(), config)
    rows["text"].sum().backward()
    assert not torch.equal(clip.codebook.grad, of_images)


# ---------------------------------------------------------------------------------- coca, sycoca


def test_later_words_change_no_earlier_logit_and_the_picture_changes_all():
    clip, _, coca, _ = prepared("coca")
    batch = a_batch()
    other = batch | {"tokens": batch["tokens"].clone()}
    other["tokens"][3, 5] = (batch["tokens"][3, 5] + 1) % 48
    logits = coca._word_logits(clip, *coca._tokens(clip, batch))                   # (b, longest, V)
    changed = coca._word_logits(clip, *coca._tokens(clip, other))
    assert torch.equal(logits[:3], changed[:3])
    assert torch.allclose(logits[3, :5], changed[3, :5], atol=1e-6)
    assert not torch.allclose(logits[3, 5], changed[3, 5], atol=1e-3)
    other = batch | {"views": batch["views"].flip(3)}
    seen = coca._word_logits(clip, *coca._tokens(clip, other))
    assert not torch.allclose(logits[:, 0], seen[:, 0], atol=1e-3)


def test_the_words_loss_is_the_mean_over_real_words():
    clip, hooks, coca, config = prepared("coca")
    batch = a_batch()
    rows = hooks.encode(clip, batch, config)
    logits = coca._word_logits(clip, *coca._tokens(clip, batch))
    for row, ids in enumerate(batch["tokens"]):
        losses = []
        for place in range(int(ids.argmax())):                      # the end token is the last
            losses.append(-logits[row, place].log_softmax(0)[ids[place + 1]])
        expected = torch.stack(losses).mean().item()
        assert rows["captioning"][row].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("idea", ["coca", "sycoca"])
def test_towers_embed_as_without_the_decoders(idea):
    clip, hooks, _, config = prepared(idea)
    batch = a_batch()
    rows, plain = hooks.encode(clip, batch, config), pretrain.encode(clip, batch, config)
    for name, row in plain.items():
        assert torch.allclose(rows[name], row, atol=1e-6), name


@pytest.mark.parametrize("idea, parts", [("coca", ["captioning"]),
                                         ("sycoca", ["captioning", "rebuilding"])])
def test_without_weight_it_is_the_plain_loss(idea, parts):
    rows = random_rows(6)
    for part in parts:
        rows[part] = torch.rand(6, dtype=torch.float64)
    config = types.SimpleNamespace(loss_chunk=0, captioning=0.0, rebuilding=0.0)
    plain = pretrain.global_loss(rows, config, Ranks()).item()
    assert hooks_of(idea).global_loss(rows, config, Ranks()).item() == plain
    config.captioning, config.rebuilding = 2.0, 3.0
    expected = plain + 2 * rows["captioning"].mean().item()
    if "rebuilding" in parts:
        expected += 3 * rows["rebuilding"].mean().item()
    loss = hooks_of(idea).global_loss(rows, config, Ranks())
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_sycoca_rebuilds_hidden_patches_from_the_others_and_the_caption():
    """One pair at a time, its caption without padding, each hidden patch by itself."""
    clip, hooks, _, config = prepared("sycoca")
    batch = a_batch()
    rows, extra = hooks.encode(clip, batch, config), clip.extra
    for row, ids in enumerate(batch["tokens"]):
        view, ids = batch["views"][row:row + 1], ids[None, :int(ids.argmax()) + 1]
        order = sorted(range(16), key=lambda place: batch["noise"][row, place].item())
        seen = clip.vision(view, keep=torch.tensor([order[8:]]), every=True)       # (1, 9, E)
        memory = torch.cat([seen, clip.text(ids, every=True)], 1)
        rebuilt = extra.pixels(extra.rebuild(extra.places[order[:8]][None], memory))[0]
        patches = clip.vision(view, every=True)[0, 1:]                             # (16, E)
        total, weights = 0.0, 0.0
        for n, place in enumerate(order[:8]):
            top, left = place // 4 * 8, place % 4 * 8
            pixels = view[0, :, top:top + 8, left:left + 8].flatten()              # (192,)
            due = (pixels - pixels.mean()) / (pixels.var(correction=0) + 1e-5).sqrt()
            near = F.cosine_similarity(patches[place], rows["text"][row], dim=0)
            weight = torch.exp(10 * near)
            total += weight * (rebuilt[n] - due).square().mean()
            weights += weight
        expected = (total / weights).item()
        assert rows["rebuilding"][row].item() == pytest.approx(expected, rel=1e-4)


# --------------------------------------------------------------------------------------- vitamin


def test_the_stem_sees_patches_back_in_place():
    clip, _, _, _ = prepared("vitamin")
    seen = []
    stem = clip.vision.patch_embed
    stem.layers.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    views = a_batch()["views"]
    embedding = clip.vision(views)
    assert torch.equal(seen[0], views) and embedding.shape == (4, 64)


def test_a_token_of_the_stem_lies_where_its_patch_lies():
    """A bright spot in one patch changes that patch's token most."""
    clip, _, _, _ = prepared("vitamin")
    tokens = []
    clip.vision.patch_embed.register_forward_hook(
        lambda module, inputs, output: tokens.append(output))
    views = torch.zeros(1, 3, 32, 32)
    clip.vision(views)
    views[:, :, 10:14, 18:22] = 3.0                                                # row 1, column 2
    clip.vision(views)
    change = (tokens[1] - tokens[0]).norm(dim=2)[0]                                # (16,)
    assert tokens[0].shape == (1, 16, 96) and change.argmax().item() == 1 * 4 + 2


@pytest.mark.parametrize("model, side", [("ViT-B-32", 224), ("ViT-B-16", 224)])
def test_the_stem_serves_patches_of_16_and_32_pixels(model, side):
    _, _, vitamin, _ = prepared("vitamin")
    size = dataclasses.replace(SIZES[model], vision_width=48)
    stem = vitamin._Stem(size, (1, 1))
    patches = (side // size.patch_size) ** 2
    assert stem(torch.zeros(1, patches, 3 * size.patch_size ** 2)).shape == (1, patches, 48)


def test_vitamin_refuses_patches_of_14_pixels():
    _, hooks, _, config = prepared("vitamin")
    clip = types.SimpleNamespace(config=SIZES["ViT-L-14"])
    with pytest.raises(ValueError, match="vitamin: toy's patches"):
        hooks.prepare_model(clip, config)


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
