"""data/pairs.py: the same batches whatever ranks and workers, and what becomes of bad images."""
import base64
import io
import pickle
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data.images import Augmentation, augment_batch
from data.order import epoch_order, sample_rng
from data.pairs import (BadSamples, BadSteps, HeldOut, PairBatches, Pairs, as_loaded,
                        check_shared_memory, join_parts, load_batches, loader_line, loader_processes)
from data.ranks import Ranks, usable_cores
from data.shards import Shards, index_shards
from data.prepare.tars import write_shards
from data.text import Tokenizer

BYTES = [bytes([value]) for value in range(256)]
TOKENIZER = Tokenizer("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in
                              enumerate(BYTES + [byte + b"\0" for byte in BYTES])))
PAPER = Augmentation(crop=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8,
                     grey_p=0.2, blur_p=0.5)


SETTINGS = SimpleNamespace(image_size=16, context_length=24, seed=42)


def picture(number):
    """Noise that no other number has, as a PNG of 24 x 20."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(256, size=(20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pick(count, rng):
    return int(rng.integers(count))


def make_pairs(folder, count=20, bad=(), augmentation=PAPER, **options):
    """Pairs of `count` pictures with two captions each; those of `bad` are cut."""
    if not folder.exists():
        write_shards(folder, ((f"{i:03d}", "png", picture(i)[:100 if i in bad else None],
                               [f"one {i}", f"picture number {i}"]) for i in range(count)), 7)
    index_shards(folder, TOKENIZER)
    return Pairs(Shards(folder, TOKENIZER), TOKENIZER, SETTINGS, augmentation, pick, **options)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("data") / "pairs")


def batches(pairs, batch_size, rank=0, world=1, start=0, stop=6, workers=0):
    sampler = PairBatches(len(pairs), batch_size, rank, world, start, stop)
    return list(DataLoader(pairs, batch_sampler=sampler, collate_fn=as_loaded, num_workers=workers))


def joined(parts):
    """Batches of several ranks, laid side by side."""
    return {key: torch.cat([part[key] for part in parts])
            for key in ("images", "tokens", "draws", "samples")}


# ---------------------------------------------------------------- order

@pytest.mark.parametrize("world, workers", [(1, 2), (2, 0), (2, 2), (4, 0), (4, 2)])
def test_world_size_and_workers_change_no_byte_of_a_step(pairs, world, workers):
    whole = batches(pairs, 8, stop=3)
    ranks = [batches(pairs, 8, rank, world, stop=3, workers=workers) for rank in range(world)]
    for step in range(3):
        parts = joined([batches_of_rank[step] for batches_of_rank in ranks])
        for key, value in parts.items():
            assert torch.equal(value, whole[step][key]), key


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_no_bit_of_the_augmented_images(pairs, micro_batch):
    batch = batches(pairs, 8, stop=1)[0]
    whole = augment_batch(batch["images"], batch["draws"], PAPER)
    parts = [augment_batch(*rows, PAPER) for rows in zip(batch["images"].split(micro_batch),
                                                  batch["draws"].split(micro_batch))]
    assert torch.equal(torch.cat(parts), whole)


def test_a_resumed_run_sees_the_steps_that_were_left(pairs):
    whole, rest = batches(pairs, 8), batches(pairs, 8, start=3)
    assert len(rest) == 3
    for a, b in zip(whole[3:], rest):
        assert all(torch.equal(a[key], b[key]) for key in ("images", "tokens", "draws", "samples"))


def test_an_epoch_holds_each_sample_once_and_drops_the_partial_batch(pairs):
    seen = [batch["samples"].tolist() for batch in batches(pairs, 8, stop=4)]  # 20 pairs: 2 a epoch
    order = epoch_order(42, 0, 20).tolist()
    assert seen[0] + seen[1] == order[:16] and sorted(order) == list(range(20))
    assert seen[2] + seen[3] == epoch_order(42, 1, 20).tolist()[:16]


def test_orders_differ_by_seed_and_epoch():
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_generators_of_samples_epochs_seeds_and_orders_are_unrelated():
    draws = np.array([sample_rng(seed, epoch, sample).random(50)
                      for seed in range(3) for epoch in range(3) for sample in range(30)])
    correlations = np.corrcoef(draws)[~np.eye(len(draws), dtype=bool)]
    assert np.abs(correlations).max() < 0.75 and abs(correlations.mean()) < 0.01  # 1 / sqrt(50)
    assert (sample_rng(1, 2, 3).random(50) == sample_rng(1, 2, 3).random(50)).all()


def test_another_choice_of_pairs_has_another_fingerprint(tmp_path):
    choices = [None, range(20), range(8), range(8, 16), [*range(8)]]
    prints = [make_pairs(tmp_path / "p", chosen=chosen).fingerprint for chosen in choices]
    assert prints[0] == prints[1] and prints[2] == prints[4]
    assert len(set(prints)) == 3



def test_a_batch_of_more_pairs_than_there_are_is_refused():
    with pytest.raises(ValueError, match="batch_size=8 is more than the 7 pairs"):
        PairBatches(7, 8, 0, 1, 0, 1)


# ---------------------------------------------------------------- content

def test_tokens_are_the_tokenizer_s_and_one_of_the_sample_s_captions(pairs):
    for batch in batches(pairs, 8, stop=2):
        for sample, tokens in zip(batch["samples"].tolist(), batch["tokens"]):
            both = TOKENIZER([f"one {sample}", f"picture number {sample}"], 24)
            assert tokens.dtype == torch.int64 and any(torch.equal(tokens, row) for row in both)


def test_captions_are_chosen_by_the_sample_s_generator(pairs):
    chosen = Counter(pick(2, sample_rng(42, epoch, 5)) for epoch in range(400))
    assert abs(chosen[0] - 200) < 40  # 4 standard errors
    tokens = {tuple(pairs.__getitems__([(epoch, epoch_order(42, epoch, 20).tolist().index(5))])
                    ["tokens"][0].tolist()) for epoch in range(12)}
    assert len(tokens) == 2


def test_the_order_follows_the_seed_of_the_settings(tmp_path):
    pairs = make_pairs(tmp_path / "p")
    pairs.config.seed = 43
    batch = pairs.__getitems__([(1, position) for position in range(20)])
    assert batch["samples"].tolist() == epoch_order(43, 1, 20).tolist()


def test_a_sample_s_draws_follow_the_seed_of_the_settings(tmp_path):
    pairs = make_pairs(tmp_path / "p")
    pairs.config.seed = 43
    batch = pairs.__getitems__([(1, position) for position in range(20)])
    for sample, tokens in zip(batch["samples"].tolist(), batch["tokens"]):
        line = pick(2, sample_rng(43, 1, sample))
        assert tokens.tolist() == pairs.padded(pairs.shards.ids(sample, line)).tolist()


def test_a_long_caption_is_cut_and_keeps_its_end(tmp_path):
    write_shards(tmp_path / "p", [("a", "png", picture(0), ["word " * 50])])
    index_shards(tmp_path / "p", TOKENIZER)
    settings = SimpleNamespace(image_size=16, context_length=12, seed=0)
    pairs = Pairs(Shards(tmp_path / "p", TOKENIZER), TOKENIZER, settings, PAPER, pick)
    assert torch.equal(pairs.__getitems__([(0, 0)])["tokens"], TOKENIZER("word " * 50, 12))
    assert pairs.__getitems__([(0, 0)])["tokens"][0, -1] == TOKENIZER.end


def test_chosen_pairs_are_the_only_ones_and_keep_their_draws(pairs, tmp_path):
    chosen = make_pairs(tmp_path / "p", chosen=[3, 11, 17])
    batch = chosen.__getitems__([(4, position) for position in range(3)])
    assert len(chosen) == 3 and sorted(batch["samples"].tolist()) == [3, 11, 17]
    assert chosen.fingerprint != pairs.fingerprint
    place = epoch_order(42, 4, 20).tolist().index(batch["samples"][0].item())
    assert torch.equal(pairs.__getitems__([(4, place)])["images"][0], batch["images"][0])


def second_view(pairs, sample, caption, rng, config):
    return {"noise": rng.random(2, np.float32), "caption": np.int64(caption + config.seed)}


def test_extra_arrays_are_drawn_last_and_move_nothing_else(pairs, tmp_path):
    more = make_pairs(tmp_path / "p", extra_arrays=second_view)
    places = [(2, position) for position in range(8)]
    plain, batch = pairs.__getitems__(places), more.__getitems__(places)
    assert all(torch.equal(plain[key], batch[key]) for key in plain if key != "bad")
    assert batch["noise"].shape == (8, 2) and set(batch["caption"].tolist()) == {42, 43}


def test_held_out_pairs_have_the_first_of_their_captions(tmp_path):
    make_pairs(tmp_path / "p", count=3)
    assert HeldOut(tmp_path / "p").captions == ["one 0", "one 1", "one 2"]


def test_a_batch_is_the_same_in_parts_of_any_size(pairs, monkeypatch):
    whole = [part for part, in load_batches(pairs, PairBatches(20, 9, 0, 1, 0, 2), 0)]
    monkeypatch.setattr("data.pairs.PART", 4)
    order = PairBatches(20, 9, 0, 1, 0, 2)
    for expected, parts in zip(whole, load_batches(pairs, order, 0), strict=True):
        batch = join_parts(parts, torch.device("cpu"))
        assert [len(part["samples"]) for part in parts] == [4, 4, 1]
        assert all(torch.equal(batch[key], expected[key]) for key in expected if key != "bad")


def test_pairs_sent_to_a_process_make_the_same_batch(pairs):
    copy = pickle.loads(pickle.dumps(pairs))
    a, b = pairs.__getitems__([(1, 3), (1, 4)]), copy.__getitems__([(1, 3), (1, 4)])
    assert all(torch.equal(a[key], b[key]) for key in ("images", "tokens", "draws", "samples"))


# ---------------------------------------------------------------- bad images

def test_a_bad_image_gives_way_to_the_next_good_one(tmp_path):
    order = epoch_order(42, 0, 20).tolist()
    pairs = make_pairs(tmp_path / "p", bad={order[3], order[4], order[19]})
    batch = pairs.__getitems__([(0, position) for position in range(20)])
    expected = order[:3] + [order[5]] * 2 + order[5:19] + [order[0]]  # past the end: the beginning
    assert batch["samples"].tolist() == expected
    alone = pairs.__getitems__([(0, 3)])
    for key in ("images", "tokens", "draws"):  # the stand-in is as it is at its own place
        assert torch.equal(batch[key][3], batch[key][5])
        assert torch.equal(batch[key][3], alone[key][0])


def test_each_bad_image_is_reported_once_an_epoch_with_name_and_reason(tmp_path):
    pairs = make_pairs(tmp_path / "p", bad={2, 9, 10})
    expected = [("00000.tar:002", "truncated"), ("00001.tar:009", "truncated"),
                ("00001.tar:010", "truncated")]
    for batch_size in (1, 4, 20):
        found = [bad for batch in batches(pairs, batch_size, stop=20 // batch_size)
                 for bad in batch["bad"]]
        assert sorted(found) == expected


def test_a_folder_of_bad_images_is_an_error(tmp_path):
    pairs = make_pairs(tmp_path / "p", bad=range(20))
    with pytest.raises(ValueError, match="20 images in a row are bad .20 x truncated.; python -m data"):
        pairs.__getitems__([(0, 0)])


def test_thirty_percent_bad_stop_a_run_with_the_reasons(tmp_path):
    folder = tmp_path / "p"
    shutil.rmtree(folder, ignore_errors=True)
    faults = {0: b"", 1: b"<html>", 2: picture(2)[:100]}
    write_shards(folder, ((f"{i:03d}", "png", faults.get(i % 10, picture(i)), ["x"])
                          for i in range(200)))
    index_shards(folder, TOKENIZER)
    pairs = Pairs(Shards(folder, TOKENIZER), TOKENIZER, SETTINGS, PAPER, pick)
    (tmp_path / "run").mkdir()
    bad = BadSamples(tmp_path / "run")
    with pytest.raises(ValueError) as error:
        for step, batch in enumerate(batches(pairs, 50, stop=40), 1):
            bad.add(batch["bad"])
            bad.check(bad.total, 50 * step, Ranks())
    assert step == 20  # judged from 1,000 samples on
    message = str(error.value)
    assert "300 of 1,000 samples had no usable image, more than 1%" in message
    for reason in ("100 x empty", "100 x not an image", "100 x truncated"):
        assert reason in message
    lines = (tmp_path / "run" / "bad_samples.tsv").read_text().splitlines()
    assert len(lines) == 60 and "00000.tar:001\tnot an image" in lines  # each named once


def test_one_percent_bad_is_let_pass(tmp_path):
    bad = BadSamples(tmp_path)
    bad.add([(f"s{i}", "empty") for i in range(10)])
    bad.check(10, 999, Ranks())
    bad.check(10, 1000, Ranks())
    with pytest.raises(ValueError, match="11 of 1,000"):
        bad.check(11, 1000, Ranks())


def test_a_resumed_run_goes_on_counting_and_names_nothing_twice(tmp_path):
    first = BadSamples(tmp_path)
    first.add([("a", "empty"), ("b\tc", "truncated")])
    second = BadSamples(tmp_path, first.counts(Ranks()))
    second.add([("a", "empty"), ("d", "empty")])
    assert second.counts(Ranks()) == {"empty": 3, "truncated": 1} and second.total == 2
    lines = (tmp_path / "bad_samples.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["a", "b c", "d"]


def test_bad_images_of_the_runs_before_count_towards_the_limit(tmp_path):
    bad = BadSamples(tmp_path, {"empty": 9})
    bad.add([("a", "empty"), ("b", "empty")])
    with pytest.raises(ValueError, match="11 of 1,000"):
        bad.check(bad.total, 1000, Ranks())


def check_steps(bad, *norms):
    """Note steps of these gradient norms, each of two samples, and check them."""
    for step, norm in enumerate(norms):
        bad.add(step, torch.tensor([0, 1]), torch.zeros(2, 4), torch.tensor(norm))
    bad.check(Ranks(), lambda line: None)


NAMED = SimpleNamespace(shards=SimpleNamespace(name=str))


def test_a_good_step_begins_the_count_of_bad_ones_anew():
    check_steps(BadSteps(NAMED), *[float("nan")] * 4, 1.0, *[float("nan")] * 4)


# ---------------------------------------------------------------- shared memory

def test_too_little_shared_memory_is_an_error_before_workers_start(pairs, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=64 * 2**20)  # docker's default
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    large, small = PairBatches(9999, 256, 0, 1, 0, 1), PairBatches(9999, 16, 0, 1, 0, 1)
    with pytest.raises(ValueError, match="18 x 256 images.* 0.7 GB, and 0.1 GB are free"):
        check_shared_memory(large, 8, 224)
    assert check_shared_memory(small, 8, 224) == (18 * 16 * 3 * 224**2, 64 * 2**20)
    assert check_shared_memory(large, 0, 224) == (0, 0)  # loaded in the loop
    monkeypatch.setattr("data.pairs.SHARED_MEMORY", "/nowhere")
    assert check_shared_memory(large, 8, 224) == (0, 0)


def test_too_little_shared_memory_is_said_before_a_batch_is_asked_for(pairs, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="give the container more"):
        load_batches(pairs, PairBatches(20, 8, 0, 1, 0, 1), workers=1)


@pytest.mark.parametrize("workers, ranks, parts", [(8, 1, 18), (8, 8, 144), (-1, 2, 12)])
def test_parts_of_all_ranks_of_the_machine_are_counted(monkeypatch, workers, ranks, parts):
    """Two parts a loader process and a batch's own and one more; -1 shares six cores."""
    monkeypatch.setattr("data.pairs.usable_cores", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    need, _ = check_shared_memory(PairBatches(20, 16, 0, 1, 0, 0), loader_processes(workers), 8)
    assert need == parts * 16 * 3 * 8**2


def test_the_first_line_says_what_the_loader_makes_and_what_is_needed(pairs, monkeypatch):
    """Of a clock that takes 2 s for the 16 pairs, and of a shared memory of 3 GB."""
    monkeypatch.setattr("data.pairs.time.perf_counter", iter([10.0, 12.0, 20.0, 22.0]).__next__)
    usage = shutil.disk_usage("/")._replace(free=3e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    order = PairBatches(20, 8, 0, 1, 5, 9)
    assert loader_line(pairs, order, 3, 9500) == (
        "loader: 3 processes a rank, about 24 pairs/s of the 9,500 that the device can take; "
        "0.0 of 3.0 GB of /dev/shm")
    assert loader_line(pairs, order, 0, None).startswith(
        "loader: 0 processes a rank, about 8 pairs/s; 0.0 of")
    assert pairs.order_of == 2  # the epoch of step 5, at two steps an epoch


def test_a_container_has_the_cores_of_its_quota(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr("data.ranks.CPU_QUOTA", tmp_path / "cpu.max")
    assert usable_cores() == 64
    for text, cores in (("max 100000", 64), ("400000 100000", 4), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(text)
        assert usable_cores() == cores
    monkeypatch.delattr("os.sched_getaffinity")  # as on macOS
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    (tmp_path / "cpu.max").write_text("max 100000")
    assert usable_cores() == 3
