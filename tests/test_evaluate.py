"""evaluate.py from the command line on: names, result files, resuming, ranks, curves, pictures."""
import base64
import dataclasses
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from data import benchmarks, look, results
from data.prepare import tars
from data.prepare.export import export_clip
from data.benchmarks import LISTS
from data.images import MEAN, STD, eval_image
from data.prepare.tars import write_set
from data.prepare.tars import write_shards
from data.text import Tokenizer
from model import (CLIP, FORMAT, SIZES, load_clip, read_checkpoint,
                   write_checkpoint)

ROOT = Path(__file__).resolve().parent.parent
BYTES = "".join(f"{base64.b64encode(bytes([byte]) + bytes(mark)).decode()} {256 * mark + byte}\n"
                for mark in (0, 1) for byte in range(256))  # a vocabulary of single bytes
SIZE = dataclasses.replace(SIZES["toy"], vocab_size=514, vision_layers=1, text_layers=1)


def pictures(count, seed):
    """`count` noisy PNGs of 40 x 36."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
        yield buffer.getvalue()


def draw_set(folder, name, n=30, classes="abcdef", templates=("a {c}", "{c}."), seed=0):
    samples = [(f"s{i:03}", "png", picture, i % len(classes))
               for i, picture in enumerate(pictures(n, seed))]
    return write_set(folder, name, list(classes), list(templates), samples, "plain")


def draw_checkpoint(path, seed=0, kind="clip", samples=1000, vocabulary=BYTES, vocab_size=514):
    torch.manual_seed(seed)
    clip = CLIP(dataclasses.replace(SIZE, vocab_size=vocab_size))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, {
        "format": FORMAT, "kind": kind, "model": dataclasses.asdict(clip.config),
        "weights": (clip if kind == "clip" else clip.vision).state_dict(), "optimizer": None,
        "step": samples // 10, "samples": samples, "data": "none", "vocabulary": vocabulary,
        "config": {"seed": seed, "warmup_steps": 10, "batch_size": 10}})
    return str(path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Sets "letters" and "scenes", 12 judgements, 20 pairs, runs base and pi, a stage 1 tower."""
    world = tmp_path_factory.mktemp("world")
    draw_set(world / "sets", "letters")
    captions = [[f"caption {i} {j}" for j in range(1 + i % 3)] for i in range(20)]
    write_set(world / "sets", "scenes", [], [],
              [(f"s{i:03}", "png", picture, captions[i])
               for i, picture in enumerate(pictures(20, 1))], "retrieval", "retrieval")
    lines = ["id,left_vote,right_vote,votes,ref_path,left_path,right_path,split,is_imagenet,prompt"]
    for i, picture in enumerate(pictures(36, 2)):
        (world / f"{i}.png").write_bytes(picture)
    for i in range(12):
        lines.append(f"{i},{i % 2},{1 - i % 2},7,{3 * i}.png,{3 * i + 1}.png,{3 * i + 2}.png,test,"
                     f"{i % 3 == 0},noise")
    (world / "data.csv").write_text("\n".join(lines) + "\n")
    write_shards(world / "pairs", ((f"{i:03}", "png", picture, [f"picture {i}"])
                                   for i, picture in enumerate(pictures(20, 3))))
    for seed, name in enumerate(("base", "pi")):
        draw_checkpoint(world / name / "ckpt.pt", seed)
    draw_checkpoint(world / "stage1" / "ckpt.pt", 5, "vision", vocabulary=None)
    return world


@pytest.fixture
def world(drawn, tmp_path):
    """A copy of the drawn world that a test may change."""
    return Path(shutil.copytree(drawn, tmp_path / "world"))


def run(world, *checkpoints, out="out", **settings):
    """Call the script as the command line would; returns the folder of results."""
    settings = {"benchmarks": world / "sets", "workers": 0, **settings}
    evaluate.main([*map(str, checkpoints), f"--out={world / out}",
                   *(f"--{key}={value}" for key, value in settings.items())])
    return world / out


def read(path):
    return json.loads(Path(path).read_text())


# ------------------------------------------------------------------------------ names


@pytest.mark.parametrize("path, name", [
    ("out/toy/ckpt.pt", "toy"), ("out/toy/samples_000000064000.pt", "toy@64000"),
    ("out/nights/best.pt", "nights-best"), ("weights/ViT-B-32.pt", "ViT-B-32"),
    ("random:toy", "random-toy"), ("samples_of_mine.pt", "samples_of_mine")])
def test_a_result_is_named_for_its_run(path, name):
    assert results.run_name(path) == name


def test_two_results_of_one_name_are_refused_until_they_have_names(world):
    draw_checkpoint(world / "other" / "base" / "ckpt.pt", 3)
    both = [f"{world}/base/ckpt.pt", f"{world}/other/base/ckpt.pt"]
    with pytest.raises(ValueError, match="a result is called base already; .* NAME=checkpoint"):
        results.read_arguments(both, read_checkpoint)
    runs = results.read_arguments([both[0], f"other={both[1]}"], read_checkpoint)
    assert runs == {"base": {"base": both[0]}, "other": {"other": both[1]}}


def test_no_run_takes_the_name_of_the_comparison(drawn):
    with pytest.raises(ValueError, match="called comparison already"):
        results.read_arguments([f"comparison={drawn}/base/ckpt.pt"], read_checkpoint)


def test_a_checkpoint_given_twice_is_refused(drawn):
    with pytest.raises(ValueError, match="called base already"):
        results.read_arguments([f"{drawn}/base/ckpt.pt", f"{drawn}/base/../base/ckpt.pt"],
                               read_checkpoint)


def test_an_equals_sign_in_a_folder_is_no_name(world):
    os.rename(world / "base", world / "lr=3")
    path = f"{world}/lr=3/ckpt.pt"
    assert results.read_arguments([path], read_checkpoint) == {"lr=3": {"lr=3": path}}


def test_a_result_file_is_no_checkpoint(world):
    (world / "base.json").write_text("{}")
    with pytest.raises(ValueError, match="python -m data.results compares results"):
        results.read_arguments([f"{world}/base.json"], read_checkpoint)


def test_a_folder_stands_for_its_milestones_in_order_of_samples(world):
    for samples in (200, 1000, 90):
        draw_checkpoint(world / "base" / f"samples_{samples:012d}.pt", samples=samples)
    runs = results.read_arguments([f"{world}/base", f"again={world}/base"], read_checkpoint)
    assert [(name, Path(path).name) for name, path in runs["base"].items()] == [
        ("base@90", "samples_000000000090.pt"), ("base@200", "samples_000000000200.pt"),
        ("base", "ckpt.pt")]  # which has 1,000
    assert list(runs["again"]) == ["again@90", "again@200", "again"]


# ------------------------------------------------------------------------------ result files


def test_a_result_file_says_what_was_measured_on_what(world):
    result = read(run(world, world / "base" / "ckpt.pt", nights=world) / "base.json")
    assert {"run": "base", "kind": "clip", "source": "ours", "step": 100, "samples": 1000,
            "seed": 0, "precision": "float32", "quick_gelu": False,
            "list": "code"}.items() <= result.items()
    assert len(result["sha256"]) == 64 and set(result["versions"]) == {
        "python", "torch", "numpy", "pillow"}
    assert result["missing"] == [row.sets[0] for row in LISTS["code"]]
    assert list(result["tasks"]) == ["letters", "letters-knn", "scenes", "nights",
                                     "nights-imagenet", "nights-no-imagenet"]
    letters = result["tasks"]["letters"]
    assert (letters["n"], letters["classes"], letters["templates"], letters["family"]) == (
        30, 6, 2, "plain")
    assert [result["tasks"][f"nights{part}"]["n"] for part in ("", "-imagenet", "-no-imagenet")
            ] == [12, 4, 8]


def test_a_result_knows_the_seed_and_the_warm_up_of_its_run(world):
    draw_checkpoint(world / "seventh" / "ckpt.pt", seed=7)
    result = read(run(world, world / "seventh" / "ckpt.pt") / "seventh.json")
    assert (result["seed"], result["warmup_samples"]) == (7, 100)


def test_the_other_list_misses_what_neither_home_has(world):
    result = read(run(world, world / "base" / "ckpt.pt", list="plan") / "base.json")
    assert result["list"] == "plan" and {"sun397", "birdsnap"} <= set(result["missing"])
    assert not {"imagenet-o", "objectnet"} & set(result["missing"])


def test_the_figures_are_those_of_the_metric_functions(world):
    out = run(world, world / "base" / "ckpt.pt")
    clip = load_clip(world / "base" / "ckpt.pt")
    for name, benchmark in benchmarks.open_sets(world / "sets", partial=True).items():
        direct = evaluate.evaluate_set(clip, Tokenizer(BYTES), benchmark)[name]
        assert read(out / "base.json")["tasks"][name]["metrics"] == direct["metrics"]
        with np.load(out / "base.npz") as arrays:
            for metric, hits in direct["hits"].items():
                assert np.array_equal(arrays[f"{name}/{metric}"], hits)


def counted(monkeypatch):
    """The names of the sets that evaluate_set is called for, as they come."""
    calls, real = [], evaluate.evaluate_set

    def count(clip, tokenizer, found, **how):
        calls.append(found.name)
        return real(clip, tokenizer, found, **how)
    monkeypatch.setattr(evaluate, "evaluate_set", count)
    return calls


def test_finished_sets_are_not_evaluated_again(world, monkeypatch):
    calls = counted(monkeypatch)
    run(world, world / "base" / "ckpt.pt")
    draw_set(world / "sets", "added", seed=7)
    run(world, world / "base" / "ckpt.pt")
    assert calls == ["letters", "scenes", "added"]


def test_prompts_that_sets_share_are_encoded_once_a_checkpoint(world, monkeypatch):
    shutil.rmtree(world / "sets/wds_scenes_test")
    draw_set(world / "sets", "letters_again", seed=7)
    encoded, real = [], CLIP.encode_text

    def count(clip, tokens):
        encoded.append(len(tokens))
        return real(clip, tokens)
    monkeypatch.setattr(CLIP, "encode_text", count)
    run(world, world / "base" / "ckpt.pt", world / "pi" / "ckpt.pt")
    assert encoded == [12, 12]  # 6 classes in 2 templates


def test_precision_is_recorded_and_another_one_is_measured_anew(world, monkeypatch):
    calls = counted(monkeypatch)
    for dtype in ("bfloat16", "float32"):
        out = run(world, world / "base" / "ckpt.pt", dtype=dtype)
        assert read(out / "base.json")["precision"] == dtype
    assert calls == ["letters", "scenes"] * 2


def test_another_activation_of_foreign_weights_is_measured_anew(world, monkeypatch):
    export_clip(load_clip(world / "base" / "ckpt.pt"), world / "weights.pt", "open_clip")
    (world / "bytes.tiktoken").write_text(BYTES)
    calls = counted(monkeypatch)
    for quick_gelu in (True, False):
        run(world, world / "weights.pt", vocabulary=world / "bytes.tiktoken", quick_gelu=quick_gelu)
    assert calls == ["letters", "scenes"] * 2


def test_a_changed_checkpoint_starts_anew(world, monkeypatch):
    calls = counted(monkeypatch)
    run(world, world / "base" / "ckpt.pt")
    draw_checkpoint(world / "base" / "ckpt.pt", seed=9)
    run(world, world / "base" / "ckpt.pt")
    assert calls == ["letters", "scenes"] * 2


def test_a_changed_template_is_measured_anew(world, monkeypatch):
    calls = counted(monkeypatch)
    run(world, world / "base" / "ckpt.pt")
    (world / "sets/wds_letters_test/zeroshot_classification_templates.txt").write_text("the {c}\n")
    run(world, world / "base" / "ckpt.pt")
    assert calls == ["letters", "scenes", "letters"]


def test_an_evaluation_that_breaks_off_keeps_its_finished_sets(world, monkeypatch):
    shutil.move(world / "sets/wds_scenes_test", world / "kept")
    broken = draw_set(world / "sets", "zigzag", 2)
    tars.write_tar(f"{broken}/test/0.tar", [("s1.png", b"<html>"), ("s1.cls", b"0")])
    with pytest.raises(ValueError, match="s1.png: undecodable"):
        run(world, world / "base" / "ckpt.pt")
    assert list(read(world / "out/base.json")["tasks"]) == ["letters", "letters-knn"]
    assert sorted(os.listdir(world / "out")) == ["base.json", "base.npz"]  # and no comparison
    calls = counted(monkeypatch)
    shutil.rmtree(broken)
    draw_set(world / "sets", "zigzag", 2)
    run(world, world / "base" / "ckpt.pt")
    assert calls == ["zigzag"]


# ------------------------------------------------------------------------------ bad input


def test_bad_input_is_one_line_and_exit_2(world):
    done = subprocess.run([sys.executable, "evaluate.py", str(world / "none.pt"),
                           f"--benchmarks={world}/sets", f"--out={world}/out"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not (world / "out").exists()
    assert done.stderr == f"evaluate.py: {world}/none.pt: no such checkpoint\n"


def unlike_its_row(world):
    draw_set(world / "sets", "mnist", 5)


def no_vocabulary(world):
    draw_checkpoint(world / "base" / "ckpt.pt", vocabulary=None)


def another_vocabulary(world):
    draw_checkpoint(world / "base" / "ckpt.pt", vocab_size=600)


def too_few_names(world):
    (world / "sets/wds_letters_test/classnames.txt").write_text("a\nb\n")


FAULTS = {  # what is wrong -> (how it comes about, arguments, what the message says)
    "a set unlike its row": (unlike_its_row, {}, "but MNIST has 10,000 in 10"),
    "too few class names": (too_few_names, {}, "s002.cls: label 2, but classnames.txt has 2 lines"),
    "no vocabulary": (no_vocabulary, {}, "brings no vocabulary; give --vocabulary="),
    "another vocabulary": (another_vocabulary, {}, "has 600 tokens, the vocabulary 514"),
    "no folder of sets": (None, {"benchmarks": "none"}, "benchmarks=none: no such folder"),
    "nothing to do": (None, {"benchmarks": ""}, "nothing to do"),
    "an image that is a folder": (None, {"images": "x", "image": ROOT}, "no such file"),
    "a query of nothing": (None, {"query": "red"}, "query=red: needs --images=FOLDER"),
    "an unknown list": (None, {"list": "codes"}, "list='codes': must be one of 'code', 'plan'"),
    "an unknown precision": (None, {"dtype": "half"}, "must be one of 'float32', 'bfloat16'"),
    "labels of nothing": (None, {"labels": "a,b"}, "--image or --query: needs --images or --labels"),
    "labels of a query": (None, {"labels": "a,b", "query": "red", "images": "x"}, "goes with --image=FILE"),
    "batches of nothing": (None, {"batch_size": 0}, "batch_size=0: must be above 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_in_one_line_and_leaves_no_comparison(world, fault):
    spoil, settings, message = FAULTS[fault]
    if spoil:
        spoil(world)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        run(world, world / "base" / "ckpt.pt", **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (world / "out" / "comparison.json").exists()


def test_no_checkpoint_is_refused_with_an_example(world):
    with pytest.raises(ValueError, match="python evaluate.py out/toy/ckpt.pt"):
        run(world)


def test_an_unknown_size_of_random_weights_is_refused(world):
    with pytest.raises(ValueError, match="random:huge: no such size; known are ViT-B-32"):
        run(world, "random:huge")


def test_partial_sets_are_taken_on_request_and_say_so(world):
    unlike_its_row(world)
    out = run(world, world / "base" / "ckpt.pt", partial=True)
    result = read(out / "base.json")
    assert result["tasks"]["mnist"]["partial"] is True
    assert "gtsrb" in result["missing"] and "mnist" not in result["missing"]
    assert "MNIST (partial)" in (out / "comparison.md").read_text()


# ------------------------------------------------------------------------------ kinds of weights


def test_stage_1_has_judgements_and_probes(world):
    out = run(world, world / "stage1" / "ckpt.pt", world / "base" / "ckpt.pt", nights=world)
    assert set(read(out / "stage1.json")["tasks"]) == {"letters-knn", "nights", "nights-imagenet",
                                                       "nights-no-imagenet"}
    comparison = read(out / "comparison.json")
    assert set(comparison["sets"]["nights"]["arms"]) == {"stage1", "base"}
    assert set(comparison["sets"]["letters-knn"]["arms"]) == {"stage1", "base"}
    assert set(comparison["sets"]["letters"]["arms"]) == {"base"}


def test_a_finished_probe_of_stage_1_is_not_repeated(world, capsys):
    for _ in range(2):
        run(world, world / "stage1" / "ckpt.pt")
    assert "stage1: 1 sets, 1 from before" in capsys.readouterr().out


def test_stage_1_without_judgements_or_classes_is_refused(world):
    shutil.rmtree(world / "sets/wds_letters_test")
    with pytest.raises(ValueError, match="vision tower only; give --judgements"):
        run(world, world / "stage1" / "ckpt.pt")


def test_random_weights_are_drawn_from_the_seed(world):
    towers, results = [], []
    for i, seed in enumerate((0, 0, 1)):
        out = run(world, "random:toy", out=f"out{i}", benchmarks="", nights=world, seed=seed)
        results.append(read(out / "random-toy.json"))
        config = evaluate.Config(seed=seed)
        towers.append(evaluate.open_model("random:toy", config, torch.device("cpu")).vision)
    assert results[0]["sha256"] == results[1]["sha256"] != results[2]["sha256"]
    assert results[0]["tasks"]["nights"]["metrics"] == results[1]["tasks"]["nights"]["metrics"]
    weights = [next(tower.parameters()) for tower in towers]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_random_weights_with_a_vocabulary_have_a_text_side(world):
    (world / "bytes.tiktoken").write_text(BYTES)
    out = run(world, "random:toy", vocabulary=world / "bytes.tiktoken")
    assert set(read(out / "random-toy.json")["tasks"]) == {"letters", "letters-knn", "scenes"}


def test_a_checkpoint_s_own_vocabulary_comes_before_the_one_named(world):
    (world / "other.tiktoken").write_text("".join(
        f"{base64.b64encode(bytes([byte]) + bytes(mark)).decode()} {256 * (1 - mark) + byte}\n"
        for mark in (1, 0) for byte in range(256)))
    config = evaluate.Config(vocabulary=str(world / "other.tiktoken"))
    model = evaluate.open_model(str(world / "base/ckpt.pt"), config, torch.device("cpu"))
    assert model.tokenizer.text == BYTES


@pytest.mark.parametrize("layout", ["openai", "open_clip", "huggingface"])
def test_foreign_weights_get_the_figures_of_the_same_weights_in_our_file(world, layout):
    if layout == "huggingface":
        pytest.importorskip("safetensors", reason="Hugging Face's format needs it")
    clip = load_clip(world / "base" / "ckpt.pt")
    clip.config = dataclasses.replace(clip.config, quick_gelu=True)  # what OpenAI's layout means
    for tower in (clip.vision, clip.text):
        for block in tower.blocks:
            block.quick_gelu = True
    path = world / ("folder" if layout == "huggingface" else "weights.pt")
    export_clip(clip, path, layout)
    (world / "bytes.tiktoken").write_text(BYTES)
    more = {"quick_gelu": True} if layout == "open_clip" else {}
    result = read(run(world, path, vocabulary=world / "bytes.tiktoken", **more)
                  / f"{path.stem}.json")
    assert (result["source"], result["samples"], result["quick_gelu"]) == (layout, None, True)
    letters = benchmarks.BenchmarkSet(world / "sets/wds_letters_test")
    direct = evaluate.evaluate_set(clip, Tokenizer(BYTES), letters)["letters"]
    assert result["tasks"]["letters"]["metrics"] == direct["metrics"]


# ------------------------------------------------------------------------------ comparing


def arms_of(*paths):
    """Arms for data.results, one from each list of result files."""
    return [{"name": f"arm {i}", "runs": [results.read_result(path) for path in files]}
            for i, files in enumerate(paths)]


def test_results_on_other_templates_are_not_compared(world):
    run(world, world / "base" / "ckpt.pt", out="a")
    (world / "sets/wds_letters_test/zeroshot_classification_templates.txt").write_text("the {c}\n")
    run(world, world / "pi" / "ckpt.pt", out="b")
    with pytest.raises(ValueError, match="letters: base and pi had different templates"):
        results.compare(arms_of([world / "a/base.json"], [world / "b/pi.json"]))


def test_results_of_several_seeds_are_compared_as_arms(world):
    for seed, name in enumerate(("base2", "pi2"), 10):
        draw_checkpoint(world / name / "ckpt.pt", seed)
    names = ("base", "base2", "pi", "pi2")
    out = run(world, *(world / name / "ckpt.pt" for name in names))
    files = [out / f"{name}.json" for name in names]
    comparison = results.compare(arms_of(files[:2], files[2:]))
    both = [read(file)["tasks"]["letters"]["metrics"]["acc1"] for file in files[2:]]
    value = comparison["sets"]["letters"]["arms"]["arm 1"]["acc1"]
    assert (value["mean"], value["sd"]) == pytest.approx((np.mean(both), np.std(both, ddof=1)))


def test_folders_give_curves_and_a_plot_with_the_caveat(world):
    pytest.importorskip("matplotlib", reason="scaling.png is drawn with it")
    for samples in (200, 500):
        draw_checkpoint(world / "base" / f"samples_{samples:012d}.pt", samples, samples=samples)
    out = run(world, world / "base")
    scaling = read(out / "scaling.json")
    assert "not independent budgets" in scaling["caveat"]
    # random weights know nothing
    assert scaling["near_chance"] == ["letters", "letters-knn", "scenes"]
    assert Image.open(out / "scaling.png").width > 100
    assert (out / "base@200.json").exists() and (out / "base@500.json").exists()


def test_two_ranks_write_the_same_results_as_one(world):
    alone = run(world, world / "base" / "ckpt.pt", nights=world, batch_size=7)
    with socket.socket() as free:  # a port that nobody listens on
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "evaluate.py", f"{world}/base/ckpt.pt", f"--benchmarks={world}/sets",
               f"--nights={world}", f"--out={world}/two", "--workers=0", "--batch_size=7"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env={
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"})
        for rank in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    one, two = (read(folder / "base.json")["tasks"] for folder in (alone, world / "two"))
    for task in (*one.values(), *two.values()):
        del task["seconds"]
    assert one == two
    with np.load(alone / "base.npz") as a, np.load(world / "two" / "base.npz") as b:
        assert all(np.array_equal(a[key], b[key]) for key in a.files) and a.files == b.files


# ------------------------------------------------------------------------------ looking


def test_a_query_draws_a_row_of_pictures_for_each_checkpoint(world):
    heights = []
    for names in (["base"], ["base", "pi"]):
        out = run(world, *(world / name / "ckpt.pt" for name in names), benchmarks="",
                  images=world / "pairs", query="a red circle", pool=7)
        heights.append(Image.open(out / "query.png").height)
    assert heights[1] - heights[0] > 128
    assert not (world / "out" / "comparison.json").exists()


def test_the_nearest_image_to_an_image_of_the_folder_is_itself(world):
    model = evaluate.open_model(str(world / "stage1" / "ckpt.pt"), evaluate.Config(),
                                torch.device("cpu"))
    pool = look.read_pool(world / "pairs", 20)
    (label, similar), = look.nearest_to_image("stage1", model, pool.image(3), pool)
    assert similar.argmax() == 3 and similar[3] == pytest.approx(1, abs=1e-5)


def test_unreadable_pairs_are_left_out_and_counted(tmp_path, capsys):
    good = list(pictures(3, 4))
    write_shards(tmp_path, [("0", "png", good[0], ["a"]), ("1", "png", b"<html>", ["b"]),
                            ("2", "png", good[1], ["c", "d"]), ("3", "png", good[2], ["e"])])
    pool = look.read_pool(tmp_path, 3)
    assert pool.captions == ["a", "c"] and len(pool) == 2
    assert "searching 2 images of 4, 1 unreadable ones left out" in capsys.readouterr().out


def test_stage_1_answers_an_image_and_refuses_a_text(world):
    out = run(world, world / "stage1" / "ckpt.pt", benchmarks="", images=world / "pairs",
              image=world / "3.png")
    assert Image.open(out / "query.png").width > 1000
    with pytest.raises(ValueError, match="has no text side"):
        run(world, world / "stage1" / "ckpt.pt", benchmarks="", images=world / "pairs", query="red")


def test_labels_of_an_image_have_the_probabilities_of_clip(world, capsys):
    run(world, world / "base" / "ckpt.pt", benchmarks="", image=world / "3.png", labels="one, two,six")
    printed = capsys.readouterr().out.splitlines()[-3:]
    clip, tokenizer = load_clip(world / "base" / "ckpt.pt"), Tokenizer(BYTES)
    pixels = eval_image(look.read_image(world / "3.png"), 32).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    logits, labels = [], ("one", "two", "six")
    with torch.no_grad():
        image = clip.encode_image(((pixels - mean) / std)[None])[0]
        for label in labels:
            text = clip.encode_text(tokenizer([label], clip.config.context_length))[0]
            logits.append(clip.logit_scale.exp().item() * float(image @ text))
    exponentials = np.exp(logits)
    shares = 100 * exponentials / exponentials.sum()
    order = np.argsort(-shares)
    assert [line.split()[-1] for line in printed] == [labels[i] for i in order]
    assert [float(line.split()[1]) for line in printed] == pytest.approx(shares[order], abs=0.06)


def test_labels_need_a_text_side(world):
    with pytest.raises(ValueError, match="stage1/ckpt.pt: has no text side"):
        run(world, world / "stage1" / "ckpt.pt", benchmarks="", image=world / "3.png", labels="a,b")


def test_an_unreadable_query_image_is_refused(world):
    (world / "page.png").write_text("<html>")
    with pytest.raises(ValueError, match="page.png: not an image"):
        run(world, world / "base" / "ckpt.pt", benchmarks="", images=world / "pairs",
            image=world / "page.png")


def test_a_checkpoint_with_nan_in_it_is_no_result(world, tmp_path):
    content = torch.load(world / "base" / "ckpt.pt", weights_only=True)
    content["weights"]["vision.ln_post.bias"][0] = float("nan")
    write_checkpoint(tmp_path / "nan.pt", content)
    with pytest.raises(ValueError, match="embeddings are not finite"):
        run(world, tmp_path / "nan.pt")


def test_a_folder_of_judgements_gives_a_row_each_with_its_n(toy_world, tmp_path):
    from data.triplets import Triplets
    for name in ("first", "second"):
        (tmp_path / "judgements").mkdir(exist_ok=True)
        os.symlink(toy_world / "nights", tmp_path / "judgements" / name)
    out = tmp_path / "out"
    evaluate.main(["random:toy", f"--judgements={tmp_path}/judgements", f"--out={out}",
                   f"--nights={toy_world}/nights", "--workers=0", "--min_votes=8"])
    tasks = read(out / "random-toy.json")["tasks"]
    assert {"nights", "first", "second", "first-imagenet"} <= tasks.keys()
    assert tasks["first"]["n"] == len(Triplets(toy_world / "nights", "test", 8))
    assert tasks["first"]["metrics"] == tasks["nights"]["metrics"]
    assert (tasks["second"]["family"], tasks["second-imagenet"]["part_of"]) == (
        "judgements", "second")


def test_judgements_with_fewer_votes_than_asked_for_do_not_count(world):
    lines = (world / "data.csv").read_text().splitlines()
    lines[1:5] = [line.replace(",7,", ",3,") for line in lines[1:5]]  # four of twelve
    (world / "data.csv").write_text("\n".join(lines) + "\n")
    counts = []
    for votes in (3, 7):
        out = run(world, "random:toy", out=f"out{votes}", benchmarks="", nights=world,
                  min_votes=votes)
        counts.append(read(out / "random-toy.json")["tasks"]["nights"]["n"])
    assert counts == [12, 8]


@pytest.mark.parametrize("names, message", [
    ((), "no such folder of judgements"), (("a/x.csv", "b/x.csv"), "both called x; rename one")])
def test_judgements_that_are_not_there_or_not_told_apart_are_named(tmp_path, names, message):
    for name in names:
        (tmp_path / "sets" / name).parent.mkdir(parents=True)
        (tmp_path / "sets" / name).write_text("ref,left,right,label")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate.main(["random:toy", f"--judgements={tmp_path}/sets", f"--out={tmp_path}/out"])
