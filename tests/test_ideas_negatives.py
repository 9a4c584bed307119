"""Ideas with negatives, captions and teachers: the facts of each, against independent answers."""
import dataclasses
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pretrain
from configs import load_config
from data.images import Augmentation, augment_batch
from data.pairs import Pairs
from data.prepare import toy
from data.ranks import Ranks
from data.shards import Shards, index_shards
from data.text import Tokenizer
from model import CLIP, SIZES
from tests.test_ideas import (ROOT, arguments, figures, hooks_of, random_rows, run,  # noqa: F401
                              start, tower)

KIND = {word: (kind, words[0]) for kind, table in toy.WORDS.items()
        for words in table for word in words}


def settings(idea, *options):
    """The Config of a run of `idea` on the toy."""
    argv = [str(ROOT / "configs/toy.py"), str(ROOT / f"configs/ideas/{idea}.py"), *options]
    config, _ = load_config(pretrain.Config, vars(pretrain), argv)
    load_config(pretrain.Config, vars(pretrain), [])
    return config


@pytest.fixture(scope="module")
def tokenizer(toy_world):
    return Tokenizer(toy_world / "vocabulary/toy.tiktoken")


@pytest.fixture(scope="module")
def shards_of(toy_world, tokenizer):
    """shards_of(part) -> Shards of the small toy world's pairs or held_out."""
    def build(part):
        index_shards(toy_world / part, tokenizer)
        return Shards(toy_world / part, tokenizer)
    return build


@pytest.fixture
def clip(tokenizer):
    torch.manual_seed(5)
    return CLIP(dataclasses.replace(SIZES["toy"], vocab_size=tokenizer.size))


@pytest.fixture
def batch_of(shards_of, tokenizer):
    """batch_of(idea, config, part="pairs") -> a batch of six, with views, and its Pairs."""
    def build(idea, config, part="pairs"):
        pairs = Pairs(shards_of(part), tokenizer, config, Augmentation(config.crop),
                      pretrain.pick_caption, hooks_of(idea).extra_arrays)
        batch = pairs.__getitems__([(0, position) for position in range(6)])
        batch["views"] = augment_batch(batch["images"], batch["draws"], Augmentation())
        return batch, pairs
    return build


def unit_rows(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def plain_loss(rows):
    return pretrain.global_loss(rows, SimpleNamespace(loss_chunk=0), Ranks()).item()


def loss_of(idea, rows, **own):
    return hooks_of(idea).global_loss(rows, SimpleNamespace(loss_chunk=0, **own), Ranks()).item()


def minus_log_share(logits, own):
    """-log of entry `own`'s share in a list of logits, by hand."""
    total = sum(math.exp(logit) for logit in logits)
    return -math.log(math.exp(logits[own]) / total)


# ----------------------------------------------------------------------------- negclip

def negatives_of(captions, seed=0):
    from configs.ideas.negclip import _negative
    rng = np.random.default_rng(seed)
    return [_negative(caption, rng) for caption in captions]


def toy_captions(n, seed=3):
    rng = np.random.default_rng(seed)
    return [texts[0] for texts in toy.caption(toy.draw_scenes(rng, n), rng)]


def test_negatives_keep_the_grammar_of_their_captions():
    captions = [text for text in toy_captions(400) if set(re.findall(r"\w+", text)) & KIND.keys()]
    assert len(captions) > 300
    for caption, negative in zip(captions, negatives_of(captions), strict=True):
        ours, theirs = (re.findall(r"\w+|[^\w\s]", text) for text in (negative, caption))
        changed = [(a, b) for a, b in zip(ours, theirs, strict=True)
                   if a != b and b not in ("a", "an")]
        assert 1 <= len(changed) <= 2, (caption, negative)
        assert all(KIND[a][0] == KIND[b][0] for a, b in changed), (caption, negative)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", negative), (caption, negative)


@pytest.mark.parametrize("pattern", ["a {} {} and a {} {}", "this shows a {} {} near a {} {}",
                                     "two things: a {} {}, a {} {} and a thing"])
def test_negatives_differ_in_meaning_even_where_a_swap_would_not(pattern):
    swapped = 0
    for colors in ("red blue", "red red", "red crimson", "blue green"):
        for shapes in ("star heart", "star star", "circle disc"):
            (one, two), (first, second) = colors.split(), shapes.split()
            caption = pattern.format(one, first, two, second)
            for negative in negatives_of(20 * [caption]):
                words = [KIND[word][1] for word in re.findall(r"\w+", negative) if word in KIND]
                meant = {tuple(words[:2]), tuple(words[2:])}
                true = {(KIND[one][1], KIND[first][1]), (KIND[two][1], KIND[second][1])}
                assert meant != true, (caption, negative)
                ours, theirs = (re.findall(r"\w+", text) for text in (negative, caption))
                swapped += sorted(ours) == sorted(theirs)
    assert swapped == 40  # where both kinds differ, and only there


def test_a_caption_without_known_words_has_two_swapped_or_gives_the_empty_text():
    for text, negative in zip(["The dog, the cat", "dog", "!"],
                              negatives_of(["The dog, the cat", "dog", "!"]), strict=True):
        if text.startswith("The"):
            assert negative != text.lower()
            assert sorted(re.findall(r"\w+", negative)) == ["cat", "dog", "the", "the"]
        else:
            assert negative == ""


def test_negclip_equals_the_loop_over_images_and_texts():
    rows = random_rows(5) | {"negative": unit_rows(5, 8, seed=1)}
    expected, texts = 0.0, [*rows["text"], *rows["negative"]]
    for i in range(5):
        to_texts = [5.0 * (rows["image"][i] @ text).item() for text in texts]
        to_images = [5.0 * (rows["text"][i] @ image).item() for image in rows["image"]]
        expected += (minus_log_share(to_texts, i) + minus_log_share(to_images, i)) / 2 / 5
    assert loss_of("negclip", rows) == pytest.approx(expected, rel=1e-12)


def test_negclips_batch_holds_the_negative_of_the_caption_it_took(batch_of, tokenizer, clip):
    config = settings("negclip")
    batch, _ = batch_of("negclip", config)
    captions = [tokenizer.decode(row) for row in batch["tokens"].tolist()]
    negatives = [tokenizer.decode(row) for row in batch["negative"].tolist()]
    for caption, negative in zip(captions, negatives, strict=True):
        assert sum(a != b for a, b in zip(caption.split(), negative.split(), strict=True)) <= 4
        assert caption != negative
    rows = hooks_of("negclip").encode(clip, batch, config)
    torch.testing.assert_close(rows["negative"], clip.encode_text(batch["negative"]))


# ------------------------------------------------------------------------------- degla

def test_degla_without_its_own_terms_is_negclip():
    rows = random_rows(5) | {"negative": unit_rows(5, 8, seed=1)}
    rows |= {"teacher_text": unit_rows(5, 8, seed=2), "drift": torch.rand(5, dtype=torch.float64)}
    assert loss_of("degla", rows, local=0.0, hold=0.0) == loss_of("negclip", rows)


def test_degla_equals_its_formula_pair_by_pair():
    rows = random_rows(5) | {"negative": unit_rows(5, 8, seed=1)}
    rows |= {"teacher_text": unit_rows(5, 8, seed=2), "drift": torch.rand(5, dtype=torch.float64)}
    expected = loss_of("negclip", rows)
    for i in range(5):
        image, text, wrong = (rows[name][i] for name in ("image", "text", "negative"))
        by_image = [5.0 * (image @ text).item(), 5.0 * (image @ wrong).item()]
        by_text = [10 * (text @ rows["teacher_text"][i]).item(), 10 * (text @ wrong).item()]
        expected += 0.1 * (minus_log_share(by_image, 0) + minus_log_share(by_text, 0)) / 5
        expected += 0.6 * rows["drift"][i].item() / 5
    assert loss_of("degla", rows, local=0.1, hold=0.6) == pytest.approx(expected, rel=1e-12)


def test_degla_measures_how_far_all_three_embeddings_left_the_teacher(batch_of, clip):
    config, hooks = settings("degla"), hooks_of("degla")
    batch, _ = batch_of("degla", config)
    hooks.prepare_model(clip, config)
    assert hooks.encode(clip, batch, config)["drift"].abs().max() == 0
    with torch.no_grad():
        clip.text.projection.weight.mul_(torch.rand_like(clip.text.projection.weight))
    rows, teacher = hooks.encode(clip, batch, config), clip.extra.teacher
    far = (rows["text"] - teacher.encode_text(batch["tokens"])).norm(dim=1) ** 2
    far += (rows["negative"] - teacher.encode_text(batch["negative"])).norm(dim=1) ** 2
    torch.testing.assert_close(rows["drift"], far)
    assert far.min() > 0.01 and not rows["teacher_text"].requires_grad


# ------------------------------------------------------------------------------ hqclip

def test_hqclips_tags_are_what_the_captions_words_mean(batch_of, tokenizer):
    from configs.ideas.hqclip import _TAGS
    batch, _ = batch_of("hqclip", settings("hqclip"))
    assert len(_TAGS) == sum(len(table) for table in toy.WORDS.values())
    for ids, row in zip(batch["tokens"].tolist(), batch["tags"], strict=True):
        words = tokenizer.decode(ids).split()
        for (kind, name), has in zip(_TAGS, row.tolist(), strict=True):
            assert has == bool(set(next(said for said in toy.WORDS[kind] if said[0] == name)) & set(words))
    assert batch["tags"].sum() > 6


def test_hqclip_equals_its_formula_and_without_weights_the_plain_loss():
    rows = random_rows(5) | {"negative": unit_rows(5, 8, seed=1)}
    rows["tags"] = torch.rand(5, dtype=torch.float64)
    assert loss_of("hqclip", rows, local=0.0, tag=0.0) == plain_loss(rows)
    expected = plain_loss(rows) + 0.5 * rows["tags"].mean().item()
    for image, text, wrong in zip(rows["image"], rows["text"], rows["negative"], strict=True):
        logits = [5.0 * (image @ text).item(), 5.0 * (image @ wrong).item()]
        expected += 2.0 * minus_log_share(logits, 0) / 5
    assert loss_of("hqclip", rows, local=2.0, tag=0.5) == pytest.approx(expected, rel=1e-12)


def test_hqclips_head_is_asked_for_each_tag_alike_and_not_where_there_is_none(batch_of, clip):
    config, hooks = settings("hqclip"), hooks_of("hqclip")
    batch, _ = batch_of("hqclip", config)
    batch["tags"].zero_()
    batch["tags"][1, 4] = batch["tags"][2, 3] = batch["tags"][2, 7] = 1
    hooks.prepare_model(clip, config)
    rows = hooks.encode(clip, batch, config)
    logits = clip.extra.tags(rows["image"])
    four = minus_log_share(logits[1].tolist(), 4)
    two = (minus_log_share(logits[2].tolist(), 3) + minus_log_share(logits[2].tolist(), 7)) / 2
    assert rows["tags"].tolist() == pytest.approx([0, four, two, 0, 0, 0], rel=1e-5)


# -------------------------------------------------------------------------------- svco

def place_of(xy):
    """Where a picture's point lies, as the toy's captions say it."""
    right, down = (xy * 3 // toy.SIDE).astype(int).clip(0, 2)
    place = toy.PLACES[3 * down + right]
    return "in the middle" if place == "middle" else f"at the {place}"


def test_the_turned_caption_is_true_of_the_mirrored_scene():
    from configs.ideas.svco import _turned
    points = np.random.default_rng(0).uniform(1, 63, (60, 2, 2))
    mirrored = points * [-1, 1] + [64, 0]
    turns = 0
    for (a, b), (a2, b2) in zip(points, mirrored, strict=True):
        assert _turned(place_of(a)) == place_of(a2)
        said = {toy.relation_of(a, b, random.Random(seed)) for seed in range(100)}
        true = {toy.relation_of(a2, b2, random.Random(seed)) for seed in range(100)}
        assert {_turned(text) for text in said} == true
        turns += said != true
    assert turns > 20


def test_svco_asks_four_choices_of_captions_that_name_a_side(batch_of, clip):
    config, hooks = settings("svco"), hooks_of("svco")
    batch, _ = batch_of("svco", config)
    assert batch["sided"].dtype == torch.float32
    batch["sided"] = torch.tensor([1.0, 0, 0, 0, 1, 0])
    batch["turned"] = batch["tokens"].roll(1, 0)
    rows = hooks.encode(clip, batch, config)
    pictures = rows["image"], clip.encode_image(torch.from_numpy(
        np.ascontiguousarray(batch["views"].numpy()[..., ::-1])))
    texts = rows["text"], rows["text"].roll(1, 0)
    expected = torch.zeros(6)
    for i in (0, 4):
        for own, other in ((0, 1), (1, 0)):
            right = rows["scale"] * (pictures[own][i] @ texts[own][i])
            other_text = rows["scale"] * (pictures[own][i] @ texts[other][i])
            other_picture = rows["scale"] * (pictures[other][i] @ texts[own][i])
            expected[i] += torch.log1p(torch.exp(other_text - right))
            expected[i] += torch.log1p(torch.exp(other_picture - right))
    torch.testing.assert_close(rows["choices"], expected, rtol=1e-4, atol=1e-6)


def test_svcos_batch_says_which_captions_name_a_side(batch_of, shards_of, tokenizer):
    config = settings("svco")
    _, pairs = batch_of("svco", config)
    sided = 0
    for sample in range(100):
        caption, = pairs.shards.captions(sample)
        arrays = pairs.extra_arrays(pairs, sample, 0, None, config)
        words = tokenizer.decode(arrays["turned"]).split()
        turn = {"left": "right", "right": "left"}
        assert [turn.get(word, word) for word in words] == tokenizer.decode(
            pairs.padded(tokenizer.encode([caption])[0])).split()
        assert arrays["sided"] == bool({"left", "right"} & set(words))
        sided += arrays["sided"]
    assert sided


class OneCaption(list):
    """Stands for Shards whose pairs have one caption each."""

    def captions(self, i):
        return [self[i]]


def test_svco_without_weight_is_the_plain_loss_and_needs_sides():
    rows = random_rows(5) | {"choices": torch.rand(5, dtype=torch.float64)}
    assert loss_of("svco", rows, weight=0.0) == plain_loss(rows)
    expected = plain_loss(rows) + 2 * rows["choices"].mean().item()
    assert loss_of("svco", rows, weight=2.0) == pytest.approx(expected, rel=1e-12)
    choose = hooks_of("svco").choose_pairs
    with pytest.raises(ValueError, match="^flip=0.5: "):
        choose([0], SimpleNamespace(flip=0.5))
    with pytest.raises(ValueError, match="^none of the first 1,000 pairs"):
        choose(OneCaption(["a red star", "leftovers"]), SimpleNamespace(flip=0.0))
    sides = OneCaption(["a red star", "a star at the top Left"])
    assert choose(sides, SimpleNamespace(flip=0.0)) == range(2)


# ---------------------------------------------------------------------------- captions

def test_one_caption_a_picture_is_the_plain_run_to_the_digit(arguments, tmp_path):  # noqa: F811
    argv = arguments("captions", tmp_path / "one", "--max_steps=3")[:-2]
    run([*argv, "--captions=1"])
    plain = [value for value in argv if not value.endswith("captions.py")]
    run([*plain, f"--out_dir={tmp_path}/plain"])
    assert figures(tmp_path / "one") == figures(tmp_path / "plain")


def test_several_captions_are_the_mean_of_as_many_plain_losses():
    rows = random_rows(5) | {"texts": unit_rows(5, 3, 8, seed=1)}
    rows["grouping"] = torch.rand(5, dtype=torch.float64)
    expected = sum(plain_loss(rows | {"text": rows["texts"][:, k]}) for k in range(3)) / 3
    ours = loss_of("captions", rows, captions=3, grouping=0.0)
    assert ours == pytest.approx(expected, rel=1e-12)
    expected += 0.5 * rows["grouping"].mean().item()
    ours = loss_of("captions", rows, captions=3, grouping=0.5)
    assert ours == pytest.approx(expected, rel=1e-12)


def test_a_batch_holds_different_captions_first_the_one_drawn_then_repeats(batch_of, tokenizer):
    batch, pairs = batch_of("captions", settings("captions", "--captions=4"), "pairs/held_out")
    assert torch.equal(batch["captions"][:, 0], batch["tokens"])
    for sample, rows in zip(batch["samples"].tolist(), batch["captions"], strict=True):
        lines = tokenizer.encode(pairs.shards.captions(sample))
        known = {tuple(pairs.padded(ids)) for ids in lines}
        taken = {tuple(row.tolist()) for row in rows}
        assert len(taken) == min(4, len(known)) and taken <= known


def test_grouping_equals_the_loop_over_patches(batch_of, clip):
    config, hooks = settings("captions", "--captions=2", "--grouping=1"), hooks_of("captions")
    batch, _ = batch_of("captions", config, "pairs/held_out")
    rows = hooks.encode(clip, batch, config)
    torch.testing.assert_close(rows["image"], clip.encode_image(batch["views"]))
    patches = F.normalize(clip.vision(batch["views"], every=True)[:, 1:], dim=2)
    for i in range(6):
        grouped = []
        for text in rows["texts"][i]:
            near = [(text @ patch).item() for patch in patches[i]]
            stretched = [(x - min(near)) / (max(near) - min(near) + 1e-6) for x in near]
            weights = [x if x > 1 / 16 else 0.0 for x in stretched]
            total = sum(weight * patch for weight, patch in zip(weights, patches[i], strict=True))
            grouped.append(total / total.norm())
        expected = 0.0
        for k in range(2):
            logits = [(rows["scale"] * (grouped[k] @ text)).item() for text in rows["texts"][i]]
            expected += minus_log_share(logits, k) / 2
        assert rows["grouping"][i].item() == pytest.approx(expected, rel=1e-4)


def test_pairs_with_one_caption_each_are_refused(shards_of):
    choose, config = hooks_of("captions").choose_pairs, settings("captions")
    with pytest.raises(ValueError, match="captions=3: the first 601 pairs have one$"):
        choose(shards_of("pairs"), config)
    assert choose(shards_of("pairs/held_out"), config) == range(53)


# ---------------------------------------------------------------------------- momentum

def teacher_rows(b=5):
    rows = random_rows(b)
    return rows | {"teacher_image": unit_rows(b, 8, seed=1),
                   "teacher_text": unit_rows(b, 8, seed=2)}


def test_momentum_equals_the_loop_and_without_softness_the_plain_loss():
    rows, expected = teacher_rows(), 0.0
    assert loss_of("momentum", rows, soft=0.0) == plain_loss(rows)
    for one, other in (("image", "text"), ("text", "image")):
        for i in range(5):
            logits = [5.0 * (rows[one][i] @ x).item() for x in rows[other]]
            of_teacher = rows[f"teacher_{other}"] @ rows[f"teacher_{one}"][i]
            opinion = (5.0 * of_teacher).tolist()
            for j in range(5):
                target = 0.3 * math.exp(-minus_log_share(opinion, j)) + 0.7 * (i == j)
                expected += target * minus_log_share(logits, j) / 2 / 5
    assert loss_of("momentum", rows, soft=0.3) == pytest.approx(expected, rel=1e-12)


def test_no_gradient_goes_into_the_teachers_opinion():
    rows = {name: row.clone().requires_grad_() for name, row in teacher_rows().items()}
    config = SimpleNamespace(soft=1.0, loss_chunk=0)
    hooks_of("momentum").global_loss(rows, config, Ranks()).backward()
    assert rows["teacher_text"].grad is None and rows["image"].grad.abs().sum() > 0


def test_the_teacher_is_a_moving_average(clip):
    config, hooks = settings("momentum", "--momentum=0.75"), hooks_of("momentum")
    hooks.prepare_model(clip, config)
    old = {name: tensor.clone() for name, tensor in clip.extra.teacher.state_dict().items()}
    assert not any(p.requires_grad for p in clip.extra.parameters())
    with torch.no_grad():
        for parameter in clip.text.parameters():
            parameter.add_(1.0)
    hooks.after_step(clip, 0, 10, config)
    for name, tensor in clip.extra.teacher.state_dict().items():
        moved = 0.25 if name.startswith("text.") else 0.0
        torch.testing.assert_close(tensor, old[name] + moved)


@pytest.mark.parametrize("idea", ["momentum", "pixpro"])
def test_an_average_of_the_weights_leaves_the_cap_of_the_temperature(clip, idea):
    config, hooks = settings(idea), hooks_of(idea)
    hooks.prepare_model(clip, config)
    clip.logit_scale.data.fill_(6.0)
    hooks.after_step(clip, 0, 10, config)
    assert clip.logit_scale.item() == pytest.approx(math.log(100))


def test_a_fixed_teacher_stays_and_must_fit(clip, start, tmp_path):  # noqa: F811
    hooks, config = hooks_of("momentum"), settings("momentum", f"--teacher={start}")
    hooks.prepare_model(clip, config)
    old = clip.extra.teacher.text.projection.weight.clone()
    assert not torch.equal(old, clip.text.projection.weight)
    hooks.after_step(clip, 0, 10, config)
    assert torch.equal(old, clip.extra.teacher.text.projection.weight)
    other = CLIP(dataclasses.replace(clip.config, context_length=20))
    with pytest.raises(ValueError, match="^teacher=.*: its context_length is 32, ours 20$"):
        hooks.prepare_model(other, config)


# ------------------------------------------------------------------------ zscl and modx

def test_zscl_equals_the_loop_and_without_keep_plain_fine_tuning():
    rows = random_rows(4) | {name: unit_rows(4, 8, seed=seed) for seed, name in
                             enumerate(("was", "now", "line"))}
    assert loss_of("zscl", rows, keep=0.0) == plain_loss(rows)
    now, was = (2.5 * rows[name] @ rows["line"].T for name in ("now", "was"))
    expected = 0.0
    for new, old in ((now, was), (now.T, was.T)):
        for i in range(4):
            for j in range(4):
                target = math.exp(-minus_log_share(old[i].tolist(), j))
                expected += 4 * target * minus_log_share(new[i].tolist(), j) / 4
    ours = loss_of("zscl", rows, keep=0.5)
    assert ours == pytest.approx(plain_loss(rows) + 0.5 * expected, rel=1e-12)


def test_zscls_distillation_leaves_the_temperature_to_the_plain_loss():
    grads = []
    for keep in (0.0, 1.0):
        rows = random_rows(4) | {name: unit_rows(4, 8, seed=seed) for seed, name in
                                 enumerate(("was", "now", "line"))}
        rows["scale"].requires_grad_()
        config = SimpleNamespace(loss_chunk=0, keep=keep)
        hooks_of("zscl").global_loss(rows, config, Ranks()).backward()
        grads.append(rows["scale"].grad.item())
    assert grads[1] == pytest.approx(grads[0], rel=1e-12)


def test_zscl_trains_on_its_domain_and_refers_to_all(shards_of, tokenizer, batch_of):
    shards, choose = shards_of("pairs"), hooks_of("zscl").choose_pairs
    stars = choose(shards, settings("zscl"))
    for i in range(len(shards)):
        assert (i in stars) == ("star" in tokenizer.decode(shards.ids(i, 0)).split())
    assert 20 < len(stars) < 200
    assert choose(shards, settings("zscl", "--domain=")) == list(range(601))
    with pytest.raises(ValueError, match="^domain=zebra: no caption has this word$"):
        choose(shards, settings("zscl", "--domain=zebra"))
    batch, _ = batch_of("zscl", settings("zscl"))
    known = {tuple(shards.ids(i, 0).tolist()) for i in range(len(shards))}
    for row in batch["line"].tolist():
        assert tuple(id for id in row if id and id < tokenizer.start) in known
    assert not torch.equal(batch["line"], batch["tokens"])


def test_vr_lwf_shows_the_pairs_own_pictures_to_ten_random_tokens(batch_of, tokenizer):
    batch, pairs = batch_of("zscl", settings("zscl", "--words", "--crop=(1.0,1.0)"))
    # crops of the whole picture differ by its shape alone: the two are of one picture
    near = (batch["reference"].float() - batch["images"].float()).abs().mean((1, 2, 3))
    others = (batch["reference"].float() - batch["images"].roll(1, 0).float()).abs().mean((1, 2, 3))
    assert (near < others).all()
    assert (batch["line"].argmax(1) == 11).all() and (batch["line"][:, 0] == tokenizer.start).all()


def test_zscl_compares_with_the_model_it_started_from(batch_of, clip):
    config, hooks = settings("zscl", "--init=somewhere"), hooks_of("zscl")
    batch, _ = batch_of("zscl", config)
    hooks.prepare_model(clip, config)
    rows = hooks.encode(clip, batch, config)
    torch.testing.assert_close(rows["now"], rows["was"])
    assert rows["now"].requires_grad and not rows["was"].requires_grad
    with torch.no_grad():
        clip.vision.projection.weight.mul_(torch.rand_like(clip.vision.projection.weight))
    again = hooks.encode(clip, batch, config)
    assert torch.equal(again["was"], rows["was"]) and not torch.equal(again["now"], rows["now"])


@pytest.mark.parametrize("idea", ["zscl", "modx"])
def test_what_a_trained_clip_knows_cannot_be_kept_without_one(clip, idea):
    with pytest.raises(ValueError, match="^init=: "):
        hooks_of(idea).prepare_model(clip, settings(idea))


def modx_rows(b=6):
    rows = random_rows(b)
    return rows | {"first_image": rows["image"].clone(), "first_text": rows["text"].clone()}


def test_modx_of_equal_models_is_the_plain_loss():
    rows = modx_rows()
    assert loss_of("modx", rows, keep=9.0) == pytest.approx(plain_loss(rows), rel=1e-12)


def test_modx_equals_the_loop_over_the_rows_that_were_right():
    rows = modx_rows()
    rows["first_text"] = F.normalize(rows["image"] + 2 * unit_rows(6, 8, seed=4), dim=1)
    assert loss_of("modx", rows, keep=0.0) == plain_loss(rows)
    expected, right = 0.0, 0
    for one, other in (("image", "text"), ("text", "image")):
        now = rows[one] @ rows[other].T
        old = rows[f"first_{one}"] @ rows[f"first_{other}"].T
        for i in range(6):
            if max(old[i]) > old[i, i]:
                continue
            right += 1
            for j in range(6):
                before = -minus_log_share(old[i].tolist(), j)
                moved = before + minus_log_share(now[i].tolist(), j)
                expected += math.exp(before) * moved / 6 / 2
    assert 0 < right < 12
    ours = loss_of("modx", rows, keep=3.0)
    assert ours == pytest.approx(plain_loss(rows) + 3 * expected, rel=1e-10)
