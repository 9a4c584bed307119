"""Result files, paired intervals, wins, seeds and power laws, against hand counts and truths."""
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from data import plots, results
from data.benchmarks import LISTS

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHA = {"classnames_sha256": "c", "templates_sha256": "t", "samples_sha256": "s"}


def task(accuracy=0.5, family="plain", n=100, classes=10, **more):
    return {"metrics": {"acc1": accuracy, "acc5": None, "mean_per_class_recall": accuracy},
            "main": "acc1", "family": family, "type": "classification", "n": n, "classes": classes,
            **SHA, **more}


def hits_of(accuracy, n=100):
    right = np.arange(n) < accuracy * n
    return {"acc1": right, "mean_per_class_recall": right, "labels": np.arange(n) % 10}


def run(name, accuracies, seed=0, samples=1000, **more):
    """(result, hits) of a run with the given accuracy on each set, {set: accuracy}."""
    tasks = {key: task(value, **more) for key, value in accuracies.items()}
    result = {"format": results.FORMAT, "list": "code", "run": name, "seed": seed, "samples": samples,
              "warmup_samples": 0, "tasks": tasks}
    return result, {key: hits_of(value) for key, value in accuracies.items()}


def arm(name, *accuracies, **more):
    return {"name": name, "runs": [run(f"{name}{seed}", values, seed, **more)
                                   for seed, values in enumerate(accuracies)]}


# ------------------------------------------------------------------------------ files


def test_what_is_written_is_read_back(tmp_path):
    result, hits = run("a", {"x": 0.3})
    results.write_result(tmp_path / "a", result, hits)
    read, arrays = results.read_result(tmp_path / "a.json")
    assert read == result
    assert all(np.array_equal(arrays["x"][key], array) for key, array in hits["x"].items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.npz"]


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("{}"),
                                   lambda path: path.write_text('{"format": '),
                                   lambda path: path.with_suffix(".npz").write_bytes(b"PK"),
                                   lambda path: cut(path.with_suffix(".npz"), 100),
                                   lambda path: cut(path.with_suffix(".npz"), -9)],
                         ids=["another JSON", "cut JSON", "no arrays", "cut arrays", "cut end"])
def test_a_broken_result_is_refused_in_one_line(tmp_path, spoil):
    results.write_result(tmp_path / "a", *run("a", {"x": 0.3}))
    spoil(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.json: not a result") as caught:
        results.read_result(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_a_result_without_its_arrays_is_missing(tmp_path):
    results.write_result(tmp_path / "a", *run("a", {"x": 0.3}))
    (tmp_path / "a.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.npz"):
        results.read_result(tmp_path / "a")


# ------------------------------------------------------------------------------ intervals


def test_equal_runs_differ_by_exactly_nothing():
    hits = hits_of(0.3)
    draws = results.paired_draws([hits], [hits], "acc1", "x")
    assert results.interval(draws) == [0, 0]


def test_the_paired_interval_has_the_textbook_width():
    # 1,000 samples: 100 only b has right, 50 only a: variance of a difference 0.15 - 0.05^2
    a, b = np.zeros(1000, bool), np.zeros(1000, bool)
    b[:100], a[100:150] = True, True
    low, high = results.interval(results.paired_draws([{"acc1": a}], [{"acc1": b}], "acc1", "x"))
    half = 1.96 * np.sqrt((0.15 - 0.05 ** 2) / 1000)
    assert (low, high) == pytest.approx((0.05 - half, 0.05 + half), abs=0.003)  # 2,000 draws


def test_the_interval_is_that_of_samples_drawn_one_by_one():
    # an arm of two seeds, labels of uneven classes: draw indices within each class, by hand
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2], [30, 50, 120])
    a, b = [], []
    for arm, rate in ((a, 0.4), (b, 0.5)):
        for _ in range(2):
            arm.append({"mean_per_class_recall": rng.random(200) < rate, "labels": labels})
    values = []
    for _ in range(4000):
        recalls = []
        for c in range(3):
            drawn = rng.choice(np.flatnonzero(labels == c), (labels == c).sum())
            gain = [y["mean_per_class_recall"][drawn].mean() - x["mean_per_class_recall"][drawn].mean()
                    for x, y in zip(a, b)]
            recalls.append(np.mean(gain))
        values.append(np.mean(recalls))
    draws = results.paired_draws(a, b, "mean_per_class_recall", "x", draws=20_000)
    assert draws.mean() == pytest.approx(np.mean(values), abs=0.003)  # error 0.04 / sqrt(4,000)
    assert draws.std() == pytest.approx(np.std(values), rel=0.05)     # 1 / sqrt(2 x 4,000) is 1 %
    assert results.interval(draws) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.006)


def test_draws_are_the_same_whenever_they_are_repeated():
    a, b = hits_of(0.3), hits_of(0.5)
    first, again = (results.paired_draws([a], [b], "acc1", "x") for _ in range(2))
    assert np.array_equal(first, again)


def test_per_class_recall_is_drawn_within_classes():
    # class 0: 99 samples, all gained; class 1: a single one, lost. Classes weigh the same.
    labels = np.array([0] * 99 + [1])
    a = {"mean_per_class_recall": labels == 1, "labels": labels}
    b = {"mean_per_class_recall": labels == 0, "labels": labels}
    draws = results.paired_draws([a], [b], "mean_per_class_recall", "x")
    assert np.all(draws == 0)  # (1 - 1) / 2 in every draw: no class is ever absent


def test_an_image_is_drawn_with_all_its_captions():
    image_of = np.array([0, 0, 0, 1])  # uneven: three captions and one
    right, whole = results.units(
        [{"image_retrieval_recall@1": np.array([1, 0, 1, 1], bool), "image_of": image_of}],
        "image_retrieval_recall@1")
    assert right.tolist() == [[2], [1]] and whole.tolist() == [[3], [1]]
    hits = [{"image_retrieval_recall@1": right, "image_of": image_of}
            for right in (np.zeros(4, bool), np.array([1, 1, 1, 0], bool))]
    draws = results.paired_draws([hits[0]], [hits[1]], "image_retrieval_recall@1", "x")
    assert set(np.unique(draws)) == {0, 0.75, 1}  # image 1 twice, both, image 0 twice


def test_mean_recall_is_the_mean_of_both_directions_in_every_draw():
    rng = np.random.default_rng(0)
    image_of = np.repeat(np.arange(50), 5)
    a, b = ({"image_retrieval_recall@1": rng.random(250) < p,
             "text_retrieval_recall@1": rng.random(50) < p, "image_of": image_of}
            for p in (0.3, 0.6))
    draws = results.paired_draws([a], [b], "mean_recall@1", "x")
    expected = sum(b[key].mean() - a[key].mean() for key in a if key != "image_of") / 2
    assert draws.mean() == pytest.approx(expected, abs=0.01)


def test_average_precision_has_no_interval():
    assert results.paired_draws([{}], [{}], "mean_average_precision", "x") is None


def test_student_t_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats", reason="comes with scikit-learn")
    for freedom in (1, 2, 7, 30, 31, 40, 100, 1000):
        assert results.t975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=0.003)


def test_seed_intervals_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats", reason="comes with scikit-learn")
    a, b = [0.30, 0.34, 0.31, 0.36, 0.33], [0.35, 0.37, 0.33, 0.41, 0.36]
    low, high = stats.ttest_rel(b, a).confidence_interval(0.95)
    arms = [arm("base", *({"x": value} for value in a)), arm("pi", *({"x": value} for value in b))]
    value = results.compare(arms)["sets"]["x"]["arms"]["pi"]["acc1"]
    assert value["delta_seed_interval"] == pytest.approx([low, high], abs=1e-4)


@pytest.mark.parametrize("wins, losses, p", [(8, 2, 112 / 1024), (2, 8, 112 / 1024), (5, 5, 1),
                                             (0, 0, 1), (23, 6, 0.0023)])
def test_the_sign_test_counts_coin_flips(wins, losses, p):
    # 8 of 10: 2 x (1 + 10 + 45) / 1024.  23 of 29 as in the paper: by the binomial table
    assert results.sign_test(wins, losses) == pytest.approx(p, abs=1e-4)


# ------------------------------------------------------------------------------ comparison


def test_wins_ties_and_losses_are_counted_to_the_first_arm():
    found = results.compare([arm("base", {"x": 0.3, "y": 0.5, "z": 0.2, "w": 0.9}),
                             arm("pi", {"x": 0.6, "y": 0.5, "z": 0.1, "w": 0.91})])
    count = found["counts"]["pi"]["top-1"]
    assert (count["compared"], count["wins"], count["ties"], count["losses"]) == (4, 2, 1, 1)
    assert (count["clear_wins"], count["clear_losses"]) == (1, 1)  # w's one sample is not clear
    assert found["sets"]["x"]["arms"]["pi"]["acc1"]["delta"] == pytest.approx(0.3)


def recalls(rate_image, rate_text):
    """A retrieval task of four images with two captions each, and its hits."""
    image_of = np.repeat(np.arange(4), 2)
    hits = {"image_of": image_of}
    for k in (1, 5, 10):
        hits[f"image_retrieval_recall@{k}"] = np.arange(8) < 8 * rate_image
        hits[f"text_retrieval_recall@{k}"] = np.arange(4) < 4 * rate_text
    metrics = {name: float(hits[name].mean()) for name in hits if name != "image_of"}
    metrics["mean_recall@1"] = (rate_image + rate_text) / 2
    return {**task(), "metrics": metrics, "main": "mean_recall@1", "family": "retrieval",
            "type": "retrieval", "n": 4}, hits


def add(run, name, task, hits=None):
    run[0]["tasks"][name] = task
    run[1][name] = hits or {}


def test_each_kind_of_metric_is_counted_by_itself_and_2afc_in_none():
    arms = [arm("base", {"x": 0.3}), arm("pi", {"x": 0.5})]
    for number, one in enumerate(arms):
        run = one["runs"][0]
        run[0]["tasks"]["x"]["metrics"]["acc5"] = 0.9 - 0.1 * number
        run[1]["x"]["acc5"] = np.arange(100) < 90 - 10 * number
        add(run, "pairs", *recalls(0.25 + 0.25 * number, 0.5))
        add(run, "nights", {**task(), "metrics": {"2afc": 0.6 + 0.1 * number}, "main": "2afc",
                            "family": "nights", "type": "2afc"})
    counts = results.compare(arms)["counts"]["pi"]
    found = {kind: (count["wins"], count["ties"], count["losses"]) for kind, count in counts.items()}
    assert found == {"main metric": (2, 0, 0), "top-1": (1, 0, 0), "top-5": (0, 0, 1),
                     "recalls": (3, 3, 0)}


def test_a_probe_is_no_win():
    arms = [arm("base", {"x": 0.3}), arm("pi", {"x": 0.5})]
    for number, one in enumerate(arms):
        add(one["runs"][0], "x-knn", {**task(), "metrics": {"knn": 0.4 + 0.1 * number},
                                      "main": "knn", "family": "k-NN probe", "type": "probe"})
    assert results.compare(arms)["counts"]["pi"]["main metric"]["compared"] == 1


def test_sets_come_in_the_lists_order_then_by_family_with_retrieval_and_2afc_last():
    base = arm("base", {"own_b": 0.3, "mnist": 0.3, "cifar10": 0.4})
    run = base["runs"][0]
    add(run, "nights", {**task(), "metrics": {"2afc": 0.6}, "main": "2afc", "type": "2afc"})
    add(run, "aaa_pairs", *recalls(0.5, 0.5))
    add(run, "own_a", task(family="art"))
    found = results.compare([base], LISTS["code"])
    assert list(found["sets"]) == ["cifar10", "mnist", "own_a", "own_b", "aaa_pairs", "nights"]
    assert list(results.compare([base])["families"])[-1] == "all classification"


def test_one_run_has_its_pair_beside_the_published_one():
    rows = LISTS["code"]
    base = arm("base", {"imagenetv2": 0.25})
    base["runs"][0][0]["tasks"]["imagenetv2"]["metrics"]["acc5"] = 0.5
    add(base["runs"][0], "flickr30k", *recalls(0.25, 0.75))
    lines = results.markdown(results.compare([base], rows), rows).splitlines()
    row = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[-3:-1]]
           for line in lines if line.startswith("|")}
    assert row["ImageNet-V2"] == ["25.0/50.0", "56.0/83.4"]
    assert row["Flickr30k 1K"] == ["25.0/25.0/75.0/75.0", "58.8/83.6/78.9/94.9"]
    assert row["ImageNet-O"] == ["", "47.8/-"]


def test_a_halfs_mean_and_average_precision_are_handled_by_their_kind():
    base, pi = arm("base", {"x": 0.3}), arm("pi", {"x": 0.4})
    for one in (base, pi):
        add(one["runs"][0], "many", {**task(family="plain"), "main": "mean_average_precision",
                                     "type": "multilabel",
                                     "metrics": {"mean_average_precision": 0.5}})
        for name in ("nights", "nights-imagenet"):
            part = {**task(), "metrics": {"2afc": 0.6}, "main": "2afc", "family": "nights",
                    "type": "2afc", "part_of": None if name == "nights" else "nights"}
            add(one["runs"][0], name, part, {"2afc": np.arange(100) < 60})
    found = results.compare([base, pi])
    assert found["sets"]["many"]["arms"]["pi"]["mean_average_precision"]["delta_interval"] is None
    assert found["families"]["plain"]["arms"]["pi"]["delta_interval"] is None  # one of its sets
    assert found["families"]["plain"]["arms"]["pi"]["mean"] == pytest.approx(0.45)
    assert found["families"]["all classification"]["sets"] == ["x"]
    assert found["families"]["nights"]["sets"] == ["nights"]  # its halves are in it


def test_a_family_mean_is_over_k_of_k_sets_of_the_list():
    rows = LISTS["code"]
    found = results.compare([arm("base", {"imagenetv2": 0.2, "imagenet-a": 0.4, "own": 0.9},
                                 family="imagenet-ood")], rows)
    family = found["families"]["imagenet-ood"]
    assert (family["k"], family["K"]) == (2, 6)
    assert family["arms"]["base"]["mean"] == pytest.approx(0.3)
    every = found["families"]["all classification"]
    assert every["K"] == 29 and every["sets"] == ["imagenetv2", "imagenet-a"]  # not "own"
    assert found["families"]["vtab"] == {"k": 0, "K": 12, "sets": [], "arms": {}}


def test_the_interval_of_a_family_mean_is_narrower_than_its_sets():
    names = [f"set{i}" for i in range(9)]
    found = results.compare([arm("base", dict.fromkeys(names, 0.3)),
                             arm("pi", dict.fromkeys(names, 0.5))])

    def width(value):
        return np.ptp(value["delta_interval"])
    one = np.mean([width(found["sets"][name]["arms"]["pi"]["acc1"]) for name in names])
    mean = width(found["families"]["plain"]["arms"]["pi"])
    assert mean == pytest.approx(one / 3, rel=0.15)  # nine independent sets


def test_absent_rows_say_missing_once_any_row_is_there():
    rows = LISTS["plan"]
    text = results.markdown(results.compare([arm("base", {"sun397": 0.2})], rows), rows)
    assert text.count("missing") >= 30 and "Birdsnap" in text and "62.5/91.3" in text
    header = [cell.strip() for cell in text.splitlines()[0].split("|")]
    assert header[-3:-1] == ["base: top-1/5 or R@1/5", "OpenAI B/32"]
    own = results.markdown(results.compare([arm("base", {"own": 0.2})], rows), rows)
    assert "missing" not in own and "ImageNet-1K" not in own


@pytest.mark.parametrize("what", ["classnames", "templates", "samples"])
def test_runs_that_met_different_tests_are_refused(what):
    arms = [arm("base", {"x": 0.3}), arm("pi", {"x": 0.4})]
    arms[1]["runs"][0][0]["tasks"]["x"][f"{what}_sha256"] = "other"
    with pytest.raises(ValueError, match=f"x: base0 and pi0 had different {what}"):
        results.compare(arms)


def test_a_set_that_one_run_lacks_is_named_and_left_out():
    found = results.compare([arm("base", {"x": 0.3, "y": 0.3}), arm("pi", {"x": 0.4})])
    assert list(found["sets"]) == ["x"] and found["not_in_every_run"] == ["y"]
    assert "left out: y." in results.markdown(found)


def test_an_arm_of_seeds_has_mean_deviation_and_paired_interval():
    found = results.compare([arm("base", {"x": 0.2}, {"x": 0.3}, {"x": 0.4}),
                             arm("pi", {"x": 0.3}, {"x": 0.4}, {"x": 0.5})])
    value = found["sets"]["x"]["arms"]["pi"]["acc1"]
    assert (value["mean"], value["sd"], value["seeds"]) == pytest.approx((0.4, 0.1, 3))
    assert value["delta_seed_interval"] == pytest.approx([0.1, 0.1])  # each seed gains the same
    assert "40.0 ± 10.0 (+10.0" in results.markdown(found)


def test_other_seeds_are_not_taken_for_pairs():
    arms = [arm("base", {"x": 0.2}, {"x": 0.3}), arm("pi", {"x": 0.3}, {"x": 0.4})]
    arms[1]["runs"][0][0]["seed"] = 7
    value = results.compare(arms)["sets"]["x"]["arms"]["pi"]["acc1"]
    assert value["delta_seed_interval"] is None and value["sd"] > 0


def test_runs_without_a_seed_are_not_taken_for_pairs():
    arms = [arm("base", {"x": 0.3}, {"x": 0.4}), arm("pi", {"x": 0.5}, {"x": 0.7})]
    for one in arms:
        for result, _ in one["runs"]:
            result["seed"] = None
    found = results.compare(arms)["sets"]["x"]["arms"]["pi"]["acc1"]
    assert found["delta_seed_interval"] is None


def test_the_markdown_is_a_table_with_as_many_cells_in_every_line():
    text = results.markdown(results.compare([arm("base", {"x": 0.3}), arm("pi", {"x": 0.4})]))
    lines = [line for line in text.split("\n\n")[0].splitlines()]
    assert len({line.count("|") for line in lines}) == 1
    assert "40.0 (+10.0) [" in lines[2]


def test_everything_said_is_json():
    found = results.compare([arm("base", {"x": 0.3}), arm("pi", {"x": 0.4})], LISTS["code"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# ------------------------------------------------------------------------------ scaling


def test_the_fit_recovers_a_planted_power_law():
    samples = np.array([1e4, 3e4, 1e5, 3e5, 1e6])
    fit = results.fit_power_law(samples, 0.002 * samples ** 0.37)
    assert (fit["exponent"], fit["factor"], fit["r2"]) == pytest.approx((0.37, 0.002, 1))
    assert fit["interval"] == pytest.approx([0.37, 0.37])


def test_the_fit_agrees_with_scipy_on_noise():
    stats = pytest.importorskip("scipy.stats", reason="comes with scikit-learn")
    samples = np.geomspace(1e3, 1e6, 8)
    values = samples ** 0.2 * np.exp(np.random.default_rng(0).normal(0, 0.1, 8))
    fit, line = results.fit_power_law(samples, values), stats.linregress(*np.log([samples, values]))
    assert (fit["exponent"], fit["r2"]) == pytest.approx((line.slope, line.rvalue ** 2))
    half = stats.t.ppf(0.975, 6) * line.stderr
    assert fit["interval"] == pytest.approx([line.slope - half, line.slope + half], abs=1e-4)


def test_two_points_have_no_interval_and_one_has_no_fit():
    assert results.fit_power_law([10, 100], [0.1, 0.2])["interval"] is None
    assert results.fit_power_law([10], [0.1]) is None


def test_samples_to_a_score_are_read_between_points_on_a_log_axis():
    points = [{"samples": 100, "mean": 0.1}, {"samples": 10_000, "mean": 0.3}]
    assert results.samples_to_reach(points, 0.2) == pytest.approx(1000)
    assert results.samples_to_reach(points, 0.05) == 100
    assert results.samples_to_reach(points, 0.4) is None
    untrained = {"samples": 0, "mean": 0.1}  # no place on a log axis
    assert results.samples_to_reach([untrained, points[1]], 0.2) == 10_000


def milestones(name, values, **more):
    """An arm of one seed whose only set "x" has the given values at 1,000, 2,000, ... samples."""
    runs = [run(f"{name}@{i}", {"x": value}, samples=1000 * i, **more)
            for i, value in enumerate(values, 1)]
    return {"name": name, "seeds": [runs]}


def test_scaling_tells_when_the_baselines_final_score_is_reached():
    curves = results.scaling([milestones("base", [0.3, 0.4, 0.5]),
                              milestones("pi", [0.4, 0.5, 0.6])])["curves"]["mean of plain"]
    assert curves["base"]["samples_to_baseline"] == pytest.approx(3000)
    assert curves["pi"]["samples_to_baseline"] == pytest.approx(2000)
    assert curves["pi"]["fit"]["points"] == 3


def test_the_halves_of_nights_have_curves_but_no_part_in_its_mean():
    base = milestones("base", [0.3, 0.4])
    for run in base["seeds"][0]:
        for name, value, part_of in (("nights", 0.7, None), ("nights-imagenet", 0.9, "nights")):
            add(run, name, {**task(), "metrics": {"2afc": value}, "main": "2afc",
                            "family": "nights", "type": "2afc", "part_of": part_of})
    curves = results.scaling([base])["curves"]
    assert curves["nights-imagenet"]["base"]["points"][0]["mean"] == 0.9
    assert curves["mean of nights"]["base"]["points"][0]["mean"] == 0.7


def test_points_of_the_warm_up_are_shown_but_not_fitted():
    base = milestones("base", [0.3, 0.4, 0.5])
    for result, _ in base["seeds"][0]:
        result["warmup_samples"] = 1000
    curve = results.scaling([base])["curves"]["x"]["base"]
    assert len(curve["points"]) == 3 and curve["fitted"] == [2000, 3000]


def test_a_set_within_two_standard_errors_of_chance_is_left_out():
    # chance 0.1 of 100 samples: standard error 0.03
    assert results.scaling([milestones("base", [0.1, 0.15])])["near_chance"] == ["x"]
    assert results.scaling([milestones("base", [0.1, 0.17])])["near_chance"] == []
    good, bad = milestones("base", [0.3, 0.4]), milestones("pi", [0.3, 0.1])
    assert results.scaling([good, bad])["near_chance"] == ["x"]  # at the end of any arm


def test_the_caveat_is_with_the_curves():
    assert "not independent budgets" in results.scaling([milestones("base", [0.3, 0.4])])["caveat"]


def test_the_table_of_curves_shows_exponent_and_samples_to_the_baseline():
    text = results.scaling_markdown(results.scaling([milestones("base", [0.3, 0.4, 0.5]),
                                                     milestones("pi", [0.4, 0.5, 0.6])]))
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    row = next(row for row in rows if row[1:3] == ["mean of plain", "pi"])
    assert row[3] == "60.0" and row[5] == "2,000"
    assert row[4].startswith("exponent 0.364 [") and row[4].endswith(", 3 points")


def test_points_are_means_over_seeds_that_all_have_them():
    base = milestones("base", [0.3, 0.4, 0.5])
    base["seeds"] += milestones("other", [0.5, 0.6])["seeds"]
    points = results.scaling([base])["curves"]["x"]["base"]["points"]
    assert [point["samples"] for point in points] == [1000, 2000]
    assert [point["mean"] for point in points] == pytest.approx([0.4, 0.5])


def test_seeds_without_a_common_number_of_samples_have_no_curve():
    base = milestones("base", [0.3, 0.4])
    for result, _ in base["seeds"][0]:
        result["samples"] += 7
    base["seeds"] += milestones("other", [0.5, 0.6])["seeds"]
    with pytest.raises(ValueError, match="base: its seeds have no number of samples in common"):
        results.scaling([base])


def test_chance_is_known_for_each_type():
    error = {"classification": (0.1 * 0.9 / 400) ** 0.5, "retrieval": (1 / 400 * 399 / 400 / 400) ** 0.5,
             "2afc": (0.25 / 400) ** 0.5}
    for kind, guess in (("classification", 0.1), ("retrieval", 1 / 400), ("2afc", 0.5)):
        for standard_errors, near in ((1.9, True), (2.1, False)):
            value = guess + standard_errors * error[kind]
            one = {**task(n=400), "type": kind, "main": "m", "metrics": {"m": value}}
            assert results.near_chance(one) is near
    assert not results.near_chance({**task(0.0), "type": "multilabel"})


# ------------------------------------------------------------------------------ fields


def test_comparison_and_curves_have_the_fields_of_the_published_study():
    study = ROOT / "docs" / "study"
    comparison = json.loads((study / "comparison.json").read_text())
    curves = json.loads((study / "scaling.json").read_text())
    arms = [arm("baseline", {"toy_color": 0.5}, {"toy_color": 0.4}),
            arm("pi", {"toy_color": 0.6}, {"toy_color": 0.7})]
    found = results.compare(arms)
    assert list(found) == list(comparison)
    for path in (("sets", "toy_color"), ("sets", "toy_color", "arms", "pi", "acc1"),
                 ("families", "plain"), ("families", "plain", "arms", "pi"),
                 ("counts", "pi", "top-1")):
        ours, theirs = found, comparison
        for key in path:
            ours, theirs = ours[key], theirs[key]
        assert list(ours) == list(theirs), path
    assert list(found["arms"]["pi"][0]) == list(comparison["arms"]["pi"][0])
    drawn = results.scaling([milestones("baseline", [0.3, 0.4, 0.5])])
    assert list(drawn) == list(curves)
    ours = drawn["curves"]["mean of plain"]["baseline"]
    theirs = curves["curves"]["mean of plain"]["baseline"]
    assert list(ours) == list(theirs) and list(ours["points"][0]) == list(theirs["points"][0])
    assert list(ours["fit"]) == list(theirs["fit"])


# ------------------------------------------------------------------------------ command line


def written(folder, name, value, seed=0, samples=1000):
    """Write a result whose only set has this accuracy; returns its path as text."""
    results.write_result(folder / name, *run(name, {"x": value}, seed, samples))
    return str(folder / f"{name}.json")


def test_arms_of_files_are_compared_seed_by_seed_whatever_their_order(tmp_path, capsys):
    b0, b1 = written(tmp_path, "b0", 0.2), written(tmp_path, "b1", 0.3, seed=1)
    p0, p1 = written(tmp_path, "p0", 0.3), written(tmp_path, "p1", 0.4, seed=1)
    out = tmp_path / "out"
    results.main([f"base={b0},{b1}", f"pi={p1},{p0}", f"--out={out}"])
    found = json.loads((out / "comparison.json").read_text())
    assert [run["run"] for run in found["arms"]["pi"]] == ["p0", "p1"]
    value = found["sets"]["x"]["arms"]["pi"]["acc1"]
    assert value["delta_seed_interval"] == pytest.approx([0.1, 0.1])  # paired
    text = (out / "comparison.md").read_text()
    assert "35.0 ± 7.1 (+10.0" in text and text in capsys.readouterr().out
    assert {"comparison.json", "comparison.md"} <= {path.name for path in out.iterdir()}
    assert not list(out.glob("scaling*"))  # no milestones


def test_results_of_one_seed_are_milestones_and_the_newest_is_compared(tmp_path):
    late, early = written(tmp_path, "a", 0.5, samples=3000), written(tmp_path, "a@1", 0.3)
    other = written(tmp_path, "b", 0.4, samples=3000)
    out = tmp_path / "out"
    results.main([f"a={late},{early}", other, f"--out={out}"])
    found = json.loads((out / "comparison.json").read_text())
    assert [run["samples"] for run in found["arms"]["a"]] == [3000]
    assert list(found["arms"]) == ["a", "b"]  # a file alone is called like its run
    curve = json.loads((out / "scaling.json").read_text())["curves"]["x"]["a"]
    assert [point["samples"] for point in curve["points"]] == [1000, 3000]
    assert "mean of plain" in (out / "scaling.md").read_text()


def test_foreign_weights_are_compared_but_have_no_curve(tmp_path):
    curve = ",".join([written(tmp_path, "a", 0.3), written(tmp_path, "b", 0.4, samples=2000)])
    foreign = [written(tmp_path, name, 0.6, seed=None, samples=None) for name in ("f", "g")]
    out = tmp_path / "out"
    results.main([f"theirs={','.join(foreign)}", f"ours={curve}", f"--out={out}"])
    found = json.loads((out / "comparison.json").read_text())
    assert [run["run"] for run in found["arms"]["theirs"]] == ["f", "g"]
    assert list(json.loads((out / "scaling.json").read_text())["curves"]["x"]) == ["ours"]


def test_the_list_is_that_of_the_evaluation_and_wins_are_printed(tmp_path, capsys):
    for name, value in (("a", 0.3), ("b", 0.5)):
        result, hits = run(name, {"sun397": value})
        results.write_result(tmp_path / name, {**result, "list": "plan"}, hits)
    results.main([str(tmp_path / "a.json"), str(tmp_path / "b"), f"--out={tmp_path}/out"])
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["list"] == [row.sets[0] for row in LISTS["plan"]]
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.split("\n")]
    assert next(row for row in rows if row[1:3] == ["b", "top-1"])[3:9] == list("110010")
    assert next(row for row in rows if row[1:2] == ["SUN397"])[3] == "100"


def test_an_arm_may_be_given_in_parts_and_one_without_milestones_is_a_point(tmp_path):
    first, second = written(tmp_path, "a", 0.3), written(tmp_path, "b", 0.5, samples=2000)
    other = written(tmp_path, "c", 0.4, samples=2000)
    out = tmp_path / "out"
    results.main([f"x={first}", f"x={second}", f"y={other}", f"--out={out}"])
    assert list(json.loads((out / "comparison.json").read_text())["arms"]) == ["x", "y"]
    curves = json.loads((out / "scaling.json").read_text())["curves"]["x"]
    assert [len(curves[name]["points"]) for name in ("x", "y")] == [2, 1]


def test_what_cannot_be_compared_is_refused_by_name(tmp_path):
    a, b = written(tmp_path, "a", 0.3), written(tmp_path, "b", 0.4)
    for arguments, message in (
            ([], "which results"), ([f"x={a}", f"x={b}"], f"{b}: a second result of seed 0"),
            ([f"x={a}", f"x={a.removesuffix('.json')}"], "a second result of seed 0"),
            ([f"x={a},{b}"], f"{b}: a second result of seed 0")):
        with pytest.raises(ValueError, match=message):
            results.main([*arguments, f"--out={tmp_path / 'out'}"])
    with pytest.raises(FileNotFoundError, match="none.json"):
        results.main([str(tmp_path / "none.json")])
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_wrong_in_one_line():
    done = subprocess.run([sys.executable, "-m", "data.results", "none.json"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "results.py: [Errno 2] No such file or directory: 'none.json'\n"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that matplotlib was asked to write, as they are written."""
    pytest.importorskip("matplotlib", reason="optional")
    from matplotlib.figure import Figure
    figures, real = [], Figure.savefig

    def note(figure, path, **how):
        figures.append(figure)
        real(figure, path, **how)
    monkeypatch.setattr(Figure, "savefig", note)
    return figures


def test_curves_are_drawn_with_their_means_and_chance(drawn, tmp_path):
    curves = results.scaling([milestones("base", [0.3, 0.4, 0.5]), milestones("pi", [0.4])])
    plots.draw_scaling(curves, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    axis = drawn[0].axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axis.lines}
    group = axis.get_title()
    tasks = milestones("base", [0.3])["seeds"][0][0][0]["tasks"]
    chance = np.mean([1 / tasks[name]["classes"] for name in tasks
                      if f"mean of {tasks[name]['family']}" == group or "all" in group])
    assert list(lines["chance"]) == [pytest.approx(100 * chance)] * 2
    drawn_means = [bar[0].get_ydata().tolist() for bar in axis.containers]
    assert drawn_means == [pytest.approx([30, 40, 50]), pytest.approx([40])]


def test_a_comparison_is_drawn_by_family_and_set_with_its_differences(drawn, tmp_path):
    a, b = written(tmp_path, "a", 0.3), written(tmp_path, "b", 0.4)
    results.main([f"x={a}", f"y={b}", f"--out={tmp_path / 'out'}"])
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")
    comparison = json.loads((tmp_path / "out/comparison.json").read_text())
    axis = drawn[0].axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert set(labels) == {*(f"mean of {family}" for family in comparison["families"]),
                           *comparison["sets"]}
    dots = {}
    for line in axis.lines:
        if line.get_marker() == "o":
            dots[labels[round(float(line.get_ydata()[0]))]] = float(line.get_xdata()[0])
    for name, record in comparison["sets"].items():
        assert dots[name] == pytest.approx(100 * record["arms"]["y"][record["main"]]["delta"])
    bars = [line.get_xdata() for line in axis.lines if len(line.get_xdata()) == 2
            and line.get_label().startswith("_child") and line.get_xdata()[0] != 0]
    ends = [100 * np.array(record["arms"]["y"][record["main"]]["delta_interval"])
            for record in comparison["sets"].values()]
    for interval in ends:
        assert any(np.allclose(interval, bar) for bar in bars)


def test_without_matplotlib_the_tables_are_written_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    a, b = written(tmp_path, "a", 0.3), written(tmp_path, "b", 0.4)
    results.main([f"x={a}", f"y={b}", f"--out={tmp_path / 'out'}"])
    assert "no pictures: they need matplotlib (pip install matplotlib)" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == ["comparison.json", "comparison.md"]


def test_a_set_that_an_early_milestone_lacks_has_no_curve():
    base = milestones("base", [0.3, 0.4])
    add(base["seeds"][0][1], "late", task(0.5))
    assert "late" not in results.scaling([base])["curves"]


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path):
    (tmp_path / "lr=1").mkdir()
    result, hits = run("a", {"x": 0.5})
    results.write_result(tmp_path / "lr=1" / "a", result, hits)
    arms = results.read_arms([f"{tmp_path}/lr=1/a.json"])
    assert [arm["name"] for arm in arms] == ["a"]
