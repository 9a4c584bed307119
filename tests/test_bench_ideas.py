"""The evaluators and the table of the bench of ideas, with answers written out by hand."""
import dataclasses
import importlib
import json
import math
import pathlib
import re
import types

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import perceptual_init
import pretrain
from configs import load_config
from data.images import Augmentation, draw_augmentation
from data.pairs import HeldOut
from data.prepare.toy import CLASSIFICATION, COLORS, REGIONS, SHAPES, lab_to_rgb
from data.ranks import Ranks
from data.text import Tokenizer
from model import CLIP, FORMAT, SIZES, write_checkpoint
from tests.bench import ideas
from tests.bench import ideas_questions as asked
from tests.bench import ideas_skewed

ROOT = pathlib.Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------ evaluators


def test_choice_counts_pictures_nearer_to_the_right_caption_and_ties_half():
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    right = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.6, 0.8]])
    wrong = torch.tensor([[0.0, 1.0], [0.8, 0.6], [1.0, 0.0], [0.6, 0.8]])
    # nearer, farther, nearer, as near: (1 + 0 + 1 + 0.5) / 4
    assert asked.choice(images, right, wrong) == 0.625


def test_a_blind_choice_stays_at_half_where_a_seeing_one_is_right():
    """Each caption is right of one picture and wrong of the other: only the picture tells."""
    images = torch.eye(2)
    assert asked.choice(images, torch.eye(2), torch.eye(2).flip(0)) == 1.0
    assert asked.choice(asked.blind(images), torch.eye(2), torch.eye(2).flip(0)) == 0.5


def test_blind_rows_are_the_mean_of_all():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    assert torch.allclose(asked.blind(rows), torch.full((3, 2), 0.5))


def test_quarter_hits_name_the_quarter_nearest_to_the_text():
    east, north = [1.0, 0.0], [0.0, 1.0]
    quarters = torch.tensor([[north, north, east, north], [east, north, north, north]])
    texts = torch.tensor([east, east])
    assert asked.quarter_hits(quarters, texts, [2, 1]).tolist() == [True, False]


def test_quarters_are_counted_row_by_row_from_the_top_left():
    centres = np.array([[10.0, 10.0], [50.0, 10.0], [10.0, 50.0], [50.0, 50.0]])  # right, down
    assert asked.quarter_of(centres).tolist() == [0, 1, 2, 3]


def test_gap_is_the_distance_of_the_two_means():
    images = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # mean (0, 0)
    texts = torch.tensor([[0.6, 0.8], [-0.6, 0.8], [0.0, 0.8]])  # mean (0, 0.8)
    assert asked.mean_gap(images, texts) == pytest.approx(0.8)


def test_unigrams_count_words_and_one_end_a_caption():
    shares = asked.word_shares([[0, 0, 1], [1]], end=3, size=4)
    # 0: 2 + 1, 1: 2 + 1, 2: 0 + 1, end: 2 + 1
    assert shares.tolist() == [0.3, 0.3, 0.1, 0.3]
    # captions "2 end" and "0 0 0 end", each a mean of its own
    expected = ((-math.log(0.1) - math.log(0.3)) / 2 - math.log(0.3)) / 2
    loss = asked.unigram_loss([[2], [0, 0, 0]], 3, shares)
    assert loss == pytest.approx(expected)


def test_active_codes_are_those_above_zero():
    weights = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.1, 0.2, 0.3, 0.4]])
    assert asked.active_codes(weights) == pytest.approx((2 + 1 + 4) / 3)


# ------------------------------------------------------------------------------ scenes


def words_in(caption, names):
    return [word for word in caption.split() if word in names]


def test_swapped_captions_exchange_the_colours_and_nothing_else():
    scenes, _ = asked.two_objects(40)
    right, wrong = asked.color_captions(scenes)
    for i in range(40):
        colors, shapes = words_in(right[i], COLORS), words_in(right[i], SHAPES)
        assert colors == [COLORS[color] for color in scenes.color[i, :2]]
        assert shapes == [SHAPES[shape] for shape in scenes.shape[i, :2]]
        assert words_in(wrong[i], SHAPES) == shapes
        assert words_in(wrong[i], COLORS) == colors[::-1] and colors[0] != colors[1]
        assert " a orange" not in f" {wrong[i]}" and " an red" not in f" {wrong[i]}"


def test_sides_are_where_the_objects_are():
    scenes, _ = asked.two_objects(40, side_by_side=True)
    right, wrong = asked.side_captions(scenes)
    seen = set()
    for i in range(40):
        side = "left" if scenes.xy[i, 0, 0] < scenes.xy[i, 1, 0] else "right"
        other = "right" if side == "left" else "left"
        assert f" {side} of " in right[i] and right[i].replace(side, other) == wrong[i]
        assert abs(scenes.xy[i, 0, 0] - scenes.xy[i, 1, 0]) > 16
        seen.add(side)
    assert seen == {"left", "right"}


def test_the_named_object_lies_in_its_quarter_of_the_picture():
    """In the rendered pixels: the colour of a plain object at its centre, not the backdrop's."""
    scenes, pictures = asked.two_objects(40)
    quarters = asked.quarter_of(scenes.xy[:, 0])
    for i in range(40):
        x, y = scenes.xy[i, 0]
        left, top = 32 * (quarters[i] % 2), 32 * (quarters[i] // 2)
        assert left <= x < left + 32 and top <= y < top + 32
        assert pictures.image(i).size == (64, 64)


# ------------------------------------------------------------------------------ asking a model

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # OpenAI's
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


class ColorReader:
    """As a CLIP: patches are embedded as their mean colour, captions as their first colour."""
    config = types.SimpleNamespace(image_size=32, context_length=32)

    def vision(self, views, every=False):
        pixels = views * STD + MEAN                                            # 0 to 1
        patches = torch.nn.functional.avg_pool2d(pixels, 8).flatten(2).mT      # (b, 16, 3)
        patches = patches - patches.mean(2, keepdim=True)  # backdrops have next to no chroma
        patches = torch.nn.functional.pad(patches, (0, 1), value=0.1)  # so pale ones lose
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)          # (b, 17, 4)

    def encode_image(self, views):
        return torch.nn.functional.normalize(self.vision(views)[:, 0], dim=1)

    def encode_text(self, colors):
        return torch.nn.functional.normalize(colors, dim=1)


def first_color(captions, context_length):
    """Captions -> (n, 4): how far the first colour that each names is from a grey, and 0."""
    rows = []
    for caption in captions:
        low, high = REGIONS[COLORS.index(words_in(caption, COLORS)[0])]
        light, chroma, hue = (low + high) / 2
        lab = np.array([light, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))])
        rgb = lab_to_rgb(lab) / 255
        rows.append([*(rgb - rgb.mean()), 0.0])
    return torch.tensor(np.array(rows), dtype=torch.float32)


def test_a_reader_of_colours_finds_objects_and_tiles_and_no_sides():
    """Places of pictures, quarters and texts belong together: else this reader would be at 25.

    Of the tiles it finds 46 %, as four pictures often share a hue; 250 of them, so 25 % +- 3.
    """
    held_out = asked.two_objects(10)[1]
    held_out.captions = ["a red star"] * 10
    figures = asked.ask(ColorReader(), first_color, held_out)
    assert figures["quarter"] > 60 and figures["tile"] > 38
    assert figures["sides"] == 50  # both captions begin alike: ties
    assert figures["quarter_blind"] < figures["quarter"]


def checkpoint(folder, idea, tokenizer, change, **settings):
    """A small CLIP with the parts of an idea, changed by hand, as a run would leave it."""
    clip = CLIP(dataclasses.replace(SIZES["toy"], vocab_size=tokenizer.size))
    recipe = importlib.import_module(f"configs.ideas.{idea}")
    if hasattr(recipe, "prepare_model"):
        recipe.prepare_model(clip, types.SimpleNamespace(**settings))
    change(clip)
    write_checkpoint(folder / "ckpt.pt", {
        "format": FORMAT, "kind": "clip", "weights": clip.state_dict(), "config": settings,
        "model": dataclasses.asdict(clip.config), "vocabulary": tokenizer.text, "samples": 7 * 128})


def test_a_writer_that_knows_nothing_needs_log_v_nats_a_word(toy_world, tmp_path):
    def know_nothing(clip):
        clip.extra.words.weight.data.zero_()
        clip.extra.words.bias.data.zero_()

    tokenizer = Tokenizer(toy_world / "vocabulary/toy.tiktoken")
    checkpoint(tmp_path, "coca", tokenizer, know_nothing)
    held_out = HeldOut(toy_world / "pairs/held_out")
    losses = asked.ask_writer(tmp_path, "coca", tokenizer, held_out)
    assert losses["words"] == pytest.approx(math.log(tokenizer.size), rel=1e-5)


def test_only_a_writer_that_looks_loses_by_anothers_picture(toy_world, tmp_path):
    def look_away(clip):  # nothing comes out of the attention to the picture
        clip.extra.decoder.multihead_attn.out_proj.weight.data.zero_()

    tokenizer = Tokenizer(toy_world / "vocabulary/toy.tiktoken")
    held_out = HeldOut(toy_world / "pairs/held_out")
    checkpoint(tmp_path, "coca", tokenizer, look_away)
    losses = asked.ask_writer(tmp_path, "coca", tokenizer, held_out)
    assert losses["words"] == losses["words_blind"]
    checkpoint(tmp_path, "coca", tokenizer, lambda clip: None)
    losses = asked.ask_writer(tmp_path, "coca", tokenizer, held_out)
    assert losses["words"] != losses["words_blind"]


def test_equal_scores_make_all_codes_active(toy_world, tmp_path):
    def all_alike(clip):
        clip.codebook.data.zero_()

    tokenizer = Tokenizer(toy_world / "vocabulary/toy.tiktoken")
    checkpoint(tmp_path, "fdt", tokenizer, all_alike, codes=20, temperature=10.0)
    held_out = HeldOut(toy_world / "pairs/held_out")
    assert asked.ask_codebook(tmp_path, held_out) == {"codes": 20.0}


def test_the_last_look_is_read_and_averaged(tmp_path):
    last = {"val_mean_recall@1": 0.25}
    for number, name in enumerate(CLASSIFICATION):
        last[f"zero_shot/{name}"] = number / 100                # 0 to 11: mean 5.5
    last |= {"zero_shot/toy_objects": 0.1, "zero_shot/toy_scenes": 0.3}
    earlier = dict.fromkeys(last, 0.9)
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(earlier)}\n{json.dumps(last)}\n")
    figures = asked.last_look(tmp_path)
    assert figures["sets"] == pytest.approx(5.5) and figures["recall"] == pytest.approx(20)
    assert figures["r1"] == 25 and figures["toy_shape"] == pytest.approx(1)


def test_a_stopped_run_is_not_measured(toy_world, tmp_path):
    tokenizer = Tokenizer(toy_world / "vocabulary/toy.tiktoken")
    checkpoint(tmp_path, "align", tokenizer, lambda clip: None, max_steps=250, batch_size=128)
    with pytest.raises(ValueError, match="stopped at step 7; the same command goes on"):
        asked.measure(tmp_path, "align")


@pytest.mark.parametrize("arm", ["tower", "pictures_tower"])
def test_a_tower_of_stage_1_is_measured_by_what_starts_from_it(tmp_path, arm):
    write_checkpoint(tmp_path / "ckpt.pt", {
        "format": FORMAT, "kind": "vision", "samples": 256,
        "config": {"max_steps": 2, "batch_size": 128}})
    assert asked.measure(tmp_path, arm) == {}


# ------------------------------------------------------------------------------ arms


def test_every_command_of_every_arm_is_accepted_by_its_script():
    config = ideas.Config()
    for arm, commands in ideas.ARMS.items():
        for command in commands:
            script, *words = ideas.words_of(command, arm, 1, config)
            module = {"pretrain.py": pretrain, "perceptual_init.py": perceptual_init}[script]
            settings, _ = load_config(module.Config, vars(module), words, files=0)
            assert settings.seed == 1 and settings.out_dir == f"out/ideas/{arm}_1"


def test_arms_differ_from_their_baseline_in_what_they_are_about():
    """An idea and its baseline have the same steps, batches and data, but where it is the point."""
    may_differ = {"flip_equal", "slip_equal", "vitamin_equal", "longer_baseline"}
    for question in ideas.QUESTIONS:
        arms = [question.baseline[0], question.measured[0]]
        before = question.text.startswith("control") and "plain" in arms
        if None in arms or before or may_differ & set(arms):
            continue
        found = []
        for arm in arms:
            script, *words = ideas.words_of(ideas.ARMS[arm][-1], arm, 1, ideas.Config())
            settings, _ = load_config(pretrain.Config, vars(pretrain), words, files=0)
            found.append([settings.max_steps, settings.batch_size, settings.data, settings.lr,
                          settings.init, settings.seed])
        assert found[0] == found[1], question


def operations(idea, world):
    """Multiply-adds times 2 of forward and backward on 53 pairs of a toy world."""
    tokenizer = Tokenizer(world / "vocabulary/toy.tiktoken")
    recipes = ["configs/toy.py"]
    if idea:
        recipes.append(f"configs/ideas/{idea}.py")
    config, _ = load_config(pretrain.Config, vars(pretrain), recipes, files=0)
    clip = CLIP(dataclasses.replace(SIZES["toy"], vocab_size=tokenizer.size))
    pretrain.prepare_model(clip, config)
    captions = HeldOut(world / "pairs/held_out").captions
    b = len(captions)
    draws = draw_augmentation(Augmentation(), np.random.default_rng(0))
    batch = {"views": torch.randn(b, 3, 32, 32), "tokens": tokenizer(captions, 32),
             "noise": torch.rand(b, 16), "strong": torch.zeros(b, 2, 3, 32, 32, dtype=torch.uint8),
             "strong_draws": torch.from_numpy(draws).expand(b, 2, -1)}
    with FlopCounterMode(display=False) as counter:
        rows = pretrain.encode(clip, batch, config)
        pretrain.global_loss(rows, config, Ranks()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("idea", ["flip", "slip", "vitamin"])
def test_equal_operations_are_equal(idea, toy_world):
    share = operations("", toy_world) / operations(idea, toy_world)
    assert ideas.EQUAL[f"{idea}_steps"] == pytest.approx(share, rel=0.03)


def test_arms_whose_towers_are_no_clip_s_are_known():
    """Their checkpoints are measured without load_clip, which refuses them."""
    own = {arm for arm, commands in ideas.ARMS.items()
           if any(word in commands[-1] for word in ("/fdt.py", "/vitamin.py", "--projectors"))}
    assert own == set(asked.OWN_TOWERS)


def test_what_an_arm_goes_on_from_is_queued_before_it():
    order = ideas.queue(ideas.QUESTIONS)
    assert sorted(order) == sorted(set(order)) and set(order) == set(ideas.ARMS)
    for arm in order:
        for one in ideas.needs(arm):
            assert order.index(one) < order.index(arm)
    assert ideas.needs("lit") == ["tower"] and ideas.needs("plain") == []


def test_every_idea_of_the_page_has_a_question_and_a_file():
    named = {question.idea for question in ideas.QUESTIONS}
    page = (ROOT / "docs/ideas.md").read_text().split("## All ideas")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` ", page, re.MULTILINE)
    assert sorted(listed) == sorted(named)
    for idea in listed:
        assert (ROOT / f"configs/ideas/{idea}.py").exists()


# ------------------------------------------------------------------------------ the table


def write(out, arm, values, figure):
    for seed, value in enumerate(values):
        path = out / f"{arm}_{seed}"
        path.mkdir(parents=True)
        (path / "measured.json").write_text(json.dumps({figure: value}))


def test_the_difference_is_of_paired_seeds_with_students_interval(tmp_path):
    write(tmp_path, "plain", [10.0, 20.0, 30.0], "recall")
    write(tmp_path, "siglip", [13.0, 22.0, 34.0], "recall")  # +3, +2, +4
    question = ideas.same("siglip", "?", "recall")
    record = ideas.answer(question, ideas.Config(out=str(tmp_path)))
    half = 4.3027 / math.sqrt(3)  # t of 2 degrees of freedom, deviation 1
    assert record["difference"]["mean"] == pytest.approx(3)
    assert record["difference"]["interval"] == pytest.approx([3 - half, 3 + half], abs=1e-3)
    assert record["verdict"] == "better than baseline"
    assert ideas.row(record)[2:] == ["20.0", "23.0", "+3.0 [+0.5, +5.5]", "better than baseline"]


@pytest.mark.parametrize("values, lower, verdict", [
    ([13.0, 22.0, 34.0], True, "worse than baseline"),
    ([7.0, 18.0, 26.0], False, "worse than baseline"),
    ([7.0, 18.0, 26.0], True, "better than baseline"),
    ([13.0, 22.0, 26.0], False, "cannot be told")])
def test_verdict_follows_the_interval_and_which_way_is_better(tmp_path, values, lower, verdict):
    write(tmp_path, "plain", [10.0, 20.0, 30.0], "gap")
    write(tmp_path, "refine", values, "gap")
    question = ideas.same("refine", "?", "gap", lower=lower)
    assert ideas.answer(question, ideas.Config(out=str(tmp_path)))["verdict"] == verdict


@pytest.mark.parametrize("values, verdict", [([49.0, 50.0, 51.5], "blind as due"),
                                             ([54.0, 55.0, 55.5], "not quite blind")])
def test_a_control_is_held_against_chance(tmp_path, values, verdict):
    write(tmp_path, "plain", [50.0, 50.0, 50.0], "colors_blind")
    write(tmp_path, "negclip", values, "colors_blind")
    question = ideas.same("negclip", "?", "colors_blind", chance=50)
    assert ideas.answer(question, ideas.Config(out=str(tmp_path)))["verdict"] == verdict


def test_a_question_with_a_missing_seed_is_not_measured_yet(tmp_path):
    write(tmp_path, "plain", [10.0, 20.0, 30.0], "recall")
    write(tmp_path, "siglip", [13.0, 22.0], "recall")
    question = ideas.same("siglip", "?", "recall")
    record = ideas.answer(question, ideas.Config(out=str(tmp_path)))
    assert ideas.row(record)[2:] == ["", "", "", "not measured yet"]


def test_the_table_keeps_an_ideas_questions_together(tmp_path):
    """A question that runs late stands with its idea; the table is written to both files."""
    asking = [ideas.same("zscl", "one", "sets"), ideas.same("flip", "two", "sets"),
              ideas.same("zscl", "three", "sets")]
    text = ideas.write_tables(asking, ideas.Config(out=str(tmp_path)))
    asked_in_order = [line.split("|")[2].strip() for line in text.splitlines()[2:]]
    assert asked_in_order == ["one", "three", "two"]
    assert (tmp_path / "table.md").read_text() == text + "\n"
    records = json.loads((tmp_path / "table.json").read_text())["answers"]
    assert [record["text"] for record in records] == asked_in_order


def test_a_folder_of_other_steps_is_refused(tmp_path):
    ideas.keep_settings(ideas.Config(out=str(tmp_path), steps=5))
    ideas.keep_settings(ideas.Config(out=str(tmp_path), steps=5, seeds=1))
    with pytest.raises(ValueError, match="name another folder"):
        ideas.keep_settings(ideas.Config(out=str(tmp_path), steps=6))


def test_an_unknown_idea_is_refused_by_name():
    with pytest.raises(ValueError, match="ideas=negclip,nope: nope is none of negclip, zscl"):
        ideas.main(["--ideas=negclip,nope"])


# ------------------------------------------------------------------------------ skewed world


class Captions:
    """As Shards, of pairs with a caption each."""

    def __init__(self, captions):
        self.texts = captions

    def __len__(self):
        return len(self.texts)

    def captions(self, i):
        return [self.texts[i]]


def test_the_skewed_world_keeps_one_in_twenty_of_the_rare_shapes():
    """ring and hoop are rare, star and plus are not, and earring is another word."""
    captions = ["a red star and a plus", "a blue ring", "a hoop and a star", "an earring"]
    kept = ideas_skewed._skewed(Captions(captions * 1000), seed=0) % 4
    counts = np.bincount(kept, minlength=4)
    assert counts[0] == 1000 and counts[3] == 1000
    assert 25 < counts[1] < 80 and 25 < counts[2] < 80  # 50, with deviation 7
