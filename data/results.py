"""Result files of evaluations, and what can honestly be said when runs are compared.

    python -m data.results base=out/b0.json,out/b1.json pi=out/p0.json,out/p1.json --out=out/x

An argument is an arm: NAME=FILES, results of evaluate.py with commas between. A file alone is
an arm called like its run. Differences are to the first arm. Results of an arm with the same
seed are milestones of one run: the newest of each seed is compared, all make the curves.
A result without a seed, as of foreign weights, is a run of its own. Writes comparison.json
and .md and, where there are milestones, scaling.json, .md and .png.

A result is <name>.json: run, checkpoint, sha256, step, samples, seed, precision, "missing" rows
and "tasks": {set: {"family", "main", "metrics": {name: 0..1 or None}, "n", ...}}. Beside it
<name>.npz keeps each sample's hits as "set/metric": with them two runs can be compared sample
by sample, also later and on another machine.

Intervals are 95 %. Letters: n samples, u units drawn anew, p parts of a metric, B draws.
"""
import json
import math
import os
import textwrap
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from configs import load_config
from data.log import run_main

FORMAT = "perceptual-clip results 1"
DRAWS = 2000  # bootstrap draws: the ends of an interval then jitter by about 3 % of its width
SAMPLES_CAVEAT = (
    "Intervals: 95 %, paired bootstrap over test samples (by class for mean per-class recall, "
    "images with all their captions for retrieval). The variance between training seeds is not "
    "in them.")
SEEDS_CAVEAT = (
    "± is the standard deviation over seeds; a second interval, after \"seeds\", is Student's "
    "t over seeds (paired where both arms have the same seeds).")
SIGN_CAVEAT = (
    "The sign test counts sets as independent and equal; sets that share images or labels (the "
    "ImageNet ones) are not, so its p is too small.")
CURVE_CAVEAT = (
    "Checkpoints of one cosine run are not independent budgets: a run that ends at n samples, "
    "its rate decayed, scores higher than a longer one passing n.")


@dataclass
class Config:
    out: str = "out/compared"  # folder of what is written
    list: str = "code"         # the paper's rows: "code" or "plan", see data/benchmarks.py


# ------------------------------------------------------------------------------ files


def write_result(path, result, hits):
    """Write a result to path.json and hits {set: {metric: array}} to path.npz, atomically."""
    arrays = {}
    for name, found in hits.items():
        for metric, array in found.items():
            arrays[f"{name}/{metric}"] = array
    with open(f"{path}.npz.tmp", "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(f"{path}.npz.tmp", f"{path}.npz")
    write_json(f"{path}.json", result)  # after its arrays: a task in the JSON has them


def write_json(path, content):
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path, text):
    """Write a text file whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


def read_result(path):
    """Read <path>.json and its .npz: (result, hits {set: {metric: array}})."""
    path, hits = str(path).removesuffix(".json"), {}
    try:
        with open(f"{path}.json", encoding="utf-8") as file:
            result = json.load(file)
        if not isinstance(result, dict) or result.get("format") != FORMAT:
            raise ValueError(f"no format={FORMAT!r} in it")
        with np.load(f"{path}.npz", allow_pickle=False) as arrays:
            for key in arrays.files:
                name, metric = key.rsplit("/", 1)
                hits.setdefault(name, {})[metric] = arrays[key]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename}: no such result file") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}.json: not a result of evaluate.py, or not whole ({error}); "
                         "remove it") from None
    return result, hits


def begin_result(folder, result):
    """FOLDER's earlier result of this run if it is of the same weights, else an empty one."""
    result = {"format": FORMAT, **result, "missing": [], "tasks": {}}
    path = os.path.join(folder, result["run"])
    if os.path.exists(f"{path}.json"):
        earlier, hits = read_result(path)
        if all(earlier[key] == result[key] for key in ("sha256", "precision", "quick_gelu")):
            return result | {"tasks": earlier["tasks"]}, hits
    return result, {}


def keep_result(folder, result, hits, rows):
    """Write what there is so far, with the sets of `rows` that are still missing."""
    names = [row.sets[0] for row in rows]
    result["missing"] = [name for name in names if name not in result["tasks"]]
    write_result(os.path.join(folder, result["run"]), result, hits)


# ------------------------------------------------------------------------------ intervals


def units(hits, metric):
    """What the bootstrap draws anew: right (u,p) and whole (u,p); None without hits.

    The metric is the mean over its p parts of sum(right) / sum(whole).  hits: one set's arrays.
    """
    if metric == "mean_recall@1":
        image_right, image_whole = units(hits, "image_retrieval_recall@1")  # (u,1)
        text_right, text_whole = units(hits, "text_retrieval_recall@1")
        return np.hstack([image_right, text_right]), np.hstack([image_whole, text_whole])
    if metric not in hits:  # average precision is no mean over samples
        return None
    right = hits[metric].astype(float)  # (n,)
    whole = np.ones(len(right))
    if metric.startswith("image_retrieval"):  # an image is drawn with all its captions
        right = np.bincount(hits["image_of"], weights=right)  # (captions,) -> (images,)
        whole = np.bincount(hits["image_of"]).astype(float)
    return right[:, None], whole[:, None]


def mean_units(seeds, metric):
    """`units` of an arm, which is the mean over its seeds: a list of one set's hits."""
    found = [units(hits, metric) for hits in seeds]
    if None in found:
        return None
    _, whole = found[0]
    return np.mean([right for right, _ in found], axis=0), whole


def paired_draws(hits_a, hits_b, metric, key, draws=DRAWS):
    """B bootstrap values (B,) of metric(b) - metric(a) on the same samples drawn anew.

    hits_a, hits_b: lists with one set's hits for each seed of an arm.  key: names the draw, so
    that a comparison can be repeated.  None if the metric has no hits.
    Mean per-class recall draws within each class and is the mean over classes.
    """
    units_a, units_b = mean_units(hits_a, metric), mean_units(hits_b, metric)
    if units_a is None or units_b is None:
        return None
    right_a, whole = units_a
    right_b, _ = units_b
    table = np.hstack([right_a, right_b, whole])                            # (u,3p)
    classes = np.zeros(len(table))
    if metric == "mean_per_class_recall":
        classes = hits_a[0]["labels"]
    rng = np.random.default_rng(zlib.crc32(f"{key}/{metric}".encode()))
    total = np.zeros(draws)
    for one in np.unique(classes):
        # Equal rows are drawn together: 50,000 samples cost no more than their few outcomes.
        rows = table[classes == one]
        kinds, counts = np.unique(rows, axis=0, return_counts=True)         # (kinds,3p)
        drawn = rng.multinomial(len(rows), counts / len(rows), size=draws)  # (B,kinds)
        sum_a, sum_b, sum_whole = np.split(drawn @ kinds, 3, axis=1)        # (B,p) each
        total += ((sum_b - sum_a) / sum_whole).mean(axis=1)
    return total / len(np.unique(classes))


def interval(draws):
    """The middle 95 % of bootstrap values, as [low, high]."""
    return np.percentile(draws, (2.5, 97.5)).tolist()


# 97.5 % points of Student's t for 1 to 30 degrees of freedom, as any table has them. NumPy and
# the standard library have none, and SciPy would be a fifth package.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
        2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def t975(freedom):
    """97.5 % point of Student's t; beyond 30 degrees of freedom 1.96 + 2.4/f, within 0.003."""
    return T975[int(freedom) - 1] if freedom < 31 else 1.96 + 2.4 / freedom


def seed_statistics(values):
    """Mean of one value a seed, with standard deviation and t interval from two seeds on."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return {"mean": mean, "seeds": n, "sd": None, "interval": None}
    sd = float(np.std(values, ddof=1))
    half = t975(n - 1) * sd / math.sqrt(n)
    return {"mean": mean, "seeds": n, "sd": sd, "interval": [mean - half, mean + half]}


def seed_interval(values_a, values_b, paired):
    """95 % interval of mean(b) - mean(a) over seeds; None below two seeds an arm.

    paired: entry i of both arms has the same seed.  Otherwise Welch's, degrees rounded down.
    """
    a, b = np.array(values_a), np.array(values_b)
    if min(len(a), len(b)) < 2:
        return None
    if paired:
        return seed_statistics(b - a)["interval"]
    square_a = a.var(ddof=1) / len(a)  # squared standard error of mean(a)
    square_b = b.var(ddof=1) / len(b)
    error = math.sqrt(square_a + square_b)
    below = square_a ** 2 / (len(a) - 1) + square_b ** 2 / (len(b) - 1)
    half = t975(max(1, error ** 4 // below)) * error if error else 0.0
    delta = b.mean() - a.mean()
    return [float(delta - half), float(delta + half)]


def sign_test(wins, losses):
    """Two-sided p of so uneven a split of wins and losses under fair coins, without ties."""
    n, few = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2 ** n)


# ------------------------------------------------------------------------------ comparing arms
# An arm is {"name", "runs": [(result, hits), ...]}: one run, or one for each seed.


def compare(arms, rows=()):
    """All that is said about arms, as one JSON-able dict; deltas are to the first arm.

    rows: the Rows of the chosen list, in whose order sets are shown and of which K are counted.
    A set is compared if all arms have it that have any of its type (stage 1 has 2AFC only), in
    every seed. ValueError where their class names, templates or samples differ.
    """
    tasks, origins = {}, {}
    found, types = Counter(), set()
    about = ("run", "checkpoint", "sha256", "step", "samples", "seed", "precision")
    for arm in arms:
        origins[arm["name"]] = []
        for result, _ in arm["runs"]:
            origins[arm["name"]].append({key: result.get(key) for key in about})
            for name, task in result["tasks"].items():
                tasks[name] = task
                found[name] += 1
                types.add((arm["name"], task["type"]))
    listed = [row.sets[0] for row in rows]
    if not tasks.keys() & listed:
        rows, listed = (), []  # none of the list is here: its table would be all gaps
    sets, left_out = {}, []
    for name in sorted_sets(tasks, listed):
        having = [arm for arm in arms if (arm["name"], tasks[name]["type"]) in types]
        if found[name] == sum(len(arm["runs"]) for arm in having):
            sets[name] = compare_set(name, having, arms[0])
        else:
            left_out.append(name)
    return {"format": "perceptual-clip comparison 1", "baseline": arms[0]["name"],
            "arms": origins, "sets": sets, "families": compare_families(sets, arms, rows),
            "counts": {arm["name"]: count_wins(sets, arm["name"]) for arm in arms[1:]},
            "list": listed, "not_in_every_run": left_out, "bootstrap_draws": DRAWS,
            "caveats": [SAMPLES_CAVEAT, SEEDS_CAVEAT, SIGN_CAVEAT]}


def sorted_sets(tasks, listed):
    """Set names: the list's, then the others by family and name; retrieval and 2AFC last."""
    def place(name):
        if name in listed:
            return 0, listed.index(name)
        kind = {"retrieval": 2, "2afc": 3}.get(tasks[name]["type"], 1)
        return kind, tasks[name]["family"], name
    return sorted(tasks, key=place)


def compare_set(name, arms, base):
    """One set: what it is, and every metric of every arm."""
    first, _ = arms[0]["runs"][0]
    for arm in arms:
        for result, _ in arm["runs"]:
            check_same_test(name, first, result)
    task = first["tasks"][name]
    about = ("family", "type", "main", "n", "classes", "templates", "captions", "partial",
             "part_of")
    record = {key: task.get(key) for key in about}
    record["arms"] = {arm["name"]: {} for arm in arms}
    for metric, value in task["metrics"].items():
        if value is not None:  # top-5 of fewer than five classes
            for arm, statistics in compare_mean([name], metric, arms, base).items():
                record["arms"][arm][metric] = statistics
    return record


def check_same_test(name, first, second):
    """ValueError if two results on one set had different names, templates or samples."""
    for key, what in (("classnames_sha256", "class names"), ("templates_sha256", "templates"),
                      ("samples_sha256", "samples")):
        if first["tasks"][name].get(key) != second["tasks"][name].get(key):
            raise ValueError(f"{name}: {first['run']} and {second['run']} had different "
                             f"{what}, so they cannot be compared; evaluate both on one folder")


def compare_mean(names, metric, arms, base):
    """Mean over sets of a metric (None: of each one's main) for each arm, and delta to base.

    The delta has an interval over samples and one over seeds.
    """
    means, base_scores, base_seeds = {}, None, None
    for arm in arms:
        seeds = [result["seed"] for result, _ in arm["runs"]]
        scores, drawn = [], []
        for name in names:
            tasks = [result["tasks"][name] for result, _ in arm["runs"]]
            chosen = metric or tasks[0]["main"]
            scores.append([task["metrics"][chosen] for task in tasks])
            if base_seeds:
                hits_a = [hits.get(name, {}) for _, hits in base["runs"]]
                hits_b = [hits.get(name, {}) for _, hits in arm["runs"]]
                drawn.append(paired_draws(hits_a, hits_b, chosen, name))
        scores = np.mean(scores, axis=0)                                    # (seeds,)
        means[arm["name"]] = value = seed_statistics(scores)
        if arm is base:
            base_scores, base_seeds = scores, seeds
        elif base_seeds:
            known = all(one is not None for one in drawn)
            distinct = None not in seeds and len(set(seeds)) == len(seeds)
            paired = distinct and seeds == base_seeds
            value["delta"] = float(scores.mean() - base_scores.mean())
            value["delta_interval"] = interval(np.mean(drawn, axis=0)) if known else None
            value["delta_seed_interval"] = seed_interval(base_scores, scores, paired)
    return means


def compare_families(sets, arms, rows):
    """Means of the main metric over each family, and over all classification sets: k of K.

    With a list, its families and the mean of all are over the sets of the list alone.
    """
    listed, sizes, members, classification = set(), Counter(), {}, []
    for row in rows:
        listed.add(row.sets[0])
        members[row.family] = []
        sizes[row.family] += 1
        sizes["all classification"] += row.main != "mean_recall@1"
    for name, record in sets.items():
        own = record["family"] not in sizes and not record["part_of"]  # not NIGHTS' halves
        if name in listed or own:
            members.setdefault(record["family"], []).append(name)
        if record["type"] == "classification" and (name in listed or not rows):
            classification.append(name)
    if rows or classification:
        members["all classification"] = classification
    families = {}
    for family, names in members.items():
        having = [arm for arm in arms if names and arm["name"] in sets[names[0]]["arms"]]
        families[family] = {"k": len(names), "K": sizes[family] or len(names), "sets": names,
                            "arms": compare_mean(names, None, having, arms[0])}
    return families


def count_wins(sets, arm):
    """Wins, ties and losses of an arm against the first, by kind of metric; without 2AFC."""
    counts = {}
    for kind, word in (("main metric", ""), ("top-1", "acc1"), ("top-5", "acc5"),
                       ("recalls", "retrieval_recall@")):
        compared = wins = losses = clear_wins = clear_losses = 0
        for record in sets.values():
            for metric, value in record["arms"].get(arm, {}).items():
                chosen = (word or record["main"]) in metric
                if record["type"] != "2afc" and chosen and "delta" in value:
                    compared += 1
                    wins += value["delta"] > 0
                    losses += value["delta"] < 0
                    low, high = value["delta_interval"] or (0, 0)
                    clear_wins += low > 0
                    clear_losses += high < 0
        counts[kind] = {"compared": compared, "wins": wins, "ties": compared - wins - losses,
                        "losses": losses, "clear_wins": clear_wins,
                        "clear_losses": clear_losses, "sign_test_p": sign_test(wins, losses)}
    return counts


# ------------------------------------------------------------------------------ Markdown


def table(header, rows):
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    widths = [0] * len(header)
    for row in (header, *rows):
        for column, cell in enumerate(row):
            widths[column] = max(widths[column], len(str(cell)))
    lines = []
    for row in (header, *rows):
        cells = [str(cell).rjust(width) for cell, width in zip(row, widths)]
        cells[0] = str(row[0]).ljust(widths[0])
        lines.append("| " + " | ".join(cells) + " |")
    rule = ["-" * (width + 1) + ":" for width in widths]
    rule[0] = "-" * (widths[0] + 2)
    lines.insert(1, "|" + "|".join(rule) + "|")
    return "\n".join(lines)


def markdown(comparison, rows=()):
    """The comparison as Markdown that can be pasted: sets, family means, wins, caveats. In %.

    rows: the list's; if any of them is there, all are shown, with what is published beside.
    """
    arms = comparison["arms"]
    parts = [set_table(comparison, rows if comparison["list"] else ())]
    lines = []
    for family, mean in comparison["families"].items():
        cells = [value_cell(mean["arms"].get(arm)) if mean["k"] else "missing" for arm in arms]
        lines.append([family, f"{mean['k']} of {mean['K']}", *cells])
    parts.append(table(["mean of main metrics", "sets", *arms], lines))
    lines = []
    for arm, kinds in comparison["counts"].items():
        for kind, count in kinds.items():
            clear = f"{count['clear_wins']} / {count['clear_losses']}"
            if count["compared"]:
                lines.append([arm, kind, count["compared"], count["wins"], count["ties"],
                              count["losses"], clear, f"{count['sign_test_p']:.2g}"])
    if lines:
        parts.append(f"Differences are to {comparison['baseline']}, in points.")
        parts.append(table(["arm", "metric", "compared", "wins", "ties", "losses",
                            "clear of 0: wins / losses", "sign test p"], lines))
    if len(arms) > 1:
        several = any(len(runs) > 1 for runs in arms.values())
        seeds = f"{SEEDS_CAVEAT}\n" if several else ""
        parts.append(f"{SAMPLES_CAVEAT}\n{seeds}{SIGN_CAVEAT}")
    if comparison["not_in_every_run"]:
        names = ", ".join(comparison["not_in_every_run"])
        parts.append(f"Not in every run, so left out: {names}.")
    return "\n\n".join(parts) + "\n"


def set_table(comparison, rows):
    """A line for each row of the list and each other set; beside the list what is published.

    One arm alone has the same pair of its own: top-1/top-5, or recall@1 to image / to text.
    """
    arms, sets = list(comparison["arms"]), comparison["sets"]
    header = ["set", "family", "n", "metric", *arms]
    if rows and len(arms) == 1:
        header.append("top-1/top-5")
    if rows:
        header.append("OpenAI B/32")
    short = {"mean_per_class_recall": "mpcr", "mean_average_precision": "mAP",
             "mean_recall@1": "R@1"}
    row_of = {row.sets[0]: row for row in rows}
    lines = []
    for name in row_of | sets:
        row, record, pair = row_of.get(name), sets.get(name), []
        title = row.title if row else name
        if record:
            main, metrics = record["main"], record["arms"].get(arms[0], {})
            title += " (partial)" if record["partial"] else ""
            line = [title, record["family"], f"{record['n']:,}", short.get(main, main)]
            line += [value_cell(record["arms"].get(arm, {}).get(main)) for arm in arms]
            for key in ("acc1", "acc5", "image_retrieval_recall@1", "text_retrieval_recall@1"):
                if key in metrics:
                    pair.append(f"{100 * metrics[key]['mean']:.1f}")
        else:
            line = [title, row.family, "", ""] + ["missing"] * len(arms)
        if rows and len(arms) == 1:
            line.append("/".join(pair))
        if rows:
            line.append(published_cell(row))
        lines.append(line)
    return table(header, lines)


def published_cell(row):
    """The pair that is published for a row, in %, with - for one that is not."""
    if row is None or row.published[0] is None:
        return ""
    pair = row.published[::2] if row.family == "retrieval" else row.published
    return "/".join("-" if value is None else f"{value:.1f}" for value in pair)


def value_cell(value):
    """A value, with its spread over seeds, and its delta with intervals, in % and points."""
    if value is None:
        return "-"
    text = f"{100 * value['mean']:.1f}"
    if value["sd"] is not None:
        text += f" ± {100 * value['sd']:.1f}"
    if "delta" not in value:
        return text
    text += f" ({100 * value['delta']:+.1f}"
    for word, key in (("", "delta_interval"), (" seeds", "delta_seed_interval")):
        if value[key]:
            low, high = value[key]
            text += f"{word} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return text + ")"


# ------------------------------------------------------------------------------ scaling
# Here an arm holds milestones: {"name", "seeds": [[(result, hits), ...by samples], ...]}.


def fit_power_law(samples, values):
    """Least squares of log(value) on log(samples): value = factor * samples ** exponent.

    Returns exponent, factor, r2, interval (95 %, Student's t, from three points on), points;
    None below two points or where a value is not positive.
    """
    if len(samples) < 2 or min(values) <= 0:
        return None
    n, x, y = len(samples), np.log(samples), np.log(values)
    dx, dy = x - x.mean(), y - y.mean()
    exponent = (dx * dy).sum() / (dx ** 2).sum()
    rest, whole = ((dy - exponent * dx) ** 2).sum(), (dy ** 2).sum()
    ends = None
    if n > 2:
        half = t975(n - 2) * math.sqrt(rest / (n - 2) / (dx ** 2).sum())
        ends = [float(exponent - half), float(exponent + half)]
    factor = np.exp(y.mean() - exponent * x.mean())
    return {"exponent": float(exponent), "factor": float(factor),
            "r2": float(1 - rest / whole) if whole else 1.0, "interval": ends, "points": n}


def samples_to_reach(points, target):
    """Samples at which a curve's points first reach target, log-linear in between, or None."""
    before = None
    for point in points:
        if point["mean"] < target:
            before = point
            continue
        if before is None or before["samples"] == 0:
            return float(point["samples"])
        share = (target - before["mean"]) / (point["mean"] - before["mean"])
        return float(before["samples"] * (point["samples"] / before["samples"]) ** share)
    return None


def near_chance(task):
    """Whether a main metric is below guessing plus two standard errors; never for mAP."""
    choices = {"classification": task["classes"], "retrieval": task["n"], "2afc": 2}
    if task["type"] not in choices:
        return False
    p = 1 / choices[task["type"]]
    return task["metrics"][task["main"]] < p + 2 * math.sqrt(p * (1 - p) / task["n"])


def scaling(arms):
    """Metric against samples, for each family and set: curve, fit, samples to the baseline.

    A point is the mean over seeds that all have it.  Sets that a result lacks have no curve.
    Left out of everything: sets within two standard errors of chance at the end of any run.
    """
    every, ends = [], []
    for arm in arms:
        for milestones in arm["seeds"]:
            every += [result["tasks"] for result, _ in milestones]
            ends.append(every[-1])
    groups, left_out = {}, []  # {curve: the sets of which it is the mean}
    for name, task in ends[0].items():
        if not all(name in tasks for tasks in every):
            continue
        if any(near_chance(tasks[name]) for tasks in ends):
            left_out.append(name)
            continue
        groups[name] = [name]
        if not task.get("part_of"):
            groups.setdefault(f"mean of {task['family']}", []).append(name)
        if task["type"] == "classification":
            groups.setdefault("mean of all classification", []).append(name)
    curves = {}
    for group in sorted(groups):
        curves[group] = {arm["name"]: curve_of(arm, groups[group]) for arm in arms}
        final = curves[group][arms[0]["name"]]["points"][-1]["mean"]
        for curve in curves[group].values():
            curve["samples_to_baseline"] = samples_to_reach(curve["points"], final)
    return {"format": "perceptual-clip scaling 1", "baseline": arms[0]["name"],
            "caveat": CURVE_CAVEAT, "near_chance": sorted(left_out), "curves": curves}


def curve_of(arm, names):
    """Mean of the sets' main metrics against samples, and its power law after the warm-up."""
    values = {}  # {samples: one value a seed}
    for milestones in arm["seeds"]:
        for result, _ in milestones:
            tasks = [result["tasks"][name] for name in names]
            mean = np.mean([task["metrics"][task["main"]] for task in tasks])
            values.setdefault(result["samples"], []).append(mean)
    newest, _ = arm["seeds"][0][-1]
    warmup = newest.get("warmup_samples") or 0
    points, fitted, means = [], [], []
    for samples in sorted(values):
        if len(values[samples]) < len(arm["seeds"]):
            continue
        point = seed_statistics(values[samples])
        points.append({"samples": samples, **point})
        if samples > warmup:
            fitted.append(samples)
            means.append(point["mean"])
    if not points:
        raise ValueError(f"{arm['name']}: its seeds have no number of samples in common")
    return {"points": points, "warmup_samples": warmup, "fit": fit_power_law(fitted, means),
            "fitted": fitted}


def scaling_markdown(scaling):
    """The fits of the means over sets as a Markdown table, with the caveat."""
    lines = []
    for group, arms in scaling["curves"].items():
        if group.startswith("mean of"):
            for arm, curve in arms.items():
                reached, final = curve["samples_to_baseline"], curve["points"][-1]["mean"]
                lines.append([group, arm, f"{100 * final:.1f}", *fit_cells(curve["fit"]),
                              f"{reached:,.0f}" if reached else "not reached"])
    header = ["curve", "arm", "final, %", "exponent", "R²", "points",
              f"samples to final of {scaling['baseline']}"]
    near = ", ".join(scaling["near_chance"]) or "none"
    return (f"{table(header, lines)}\n\nToo near chance to be fitted: {near}.\n"
            f"{scaling['caveat']}\n")


def fit_cells(fit):
    """Exponent with its interval, R², and how many points were used."""
    if fit is None:
        return ["-", "-", "-"]
    ends = " [{:.3f}, {:.3f}]".format(*fit["interval"]) if fit["interval"] else ""
    return [f"{fit['exponent']:.3f}{ends}", f"{fit['r2']:.3f}", fit["points"]]


def draw_scaling(scaling, path):
    """The curves of `scaling` as a PNG: a panel for each mean over sets, the caveat below."""
    import matplotlib  # optional: the caller says what to install
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [group for group in scaling["curves"] if group.startswith("mean of")]
    columns = max(1, min(3, len(groups)))
    rows = max(1, math.ceil(len(groups) / columns))
    figure = pyplot.figure(figsize=(4.4 * columns, 3.2 * rows + 0.6), layout="constrained")
    for number, group in enumerate(groups, 1):
        axis = figure.add_subplot(rows, columns, number)
        for color, (arm, curve) in enumerate(scaling["curves"][group].items()):
            draw_curve(axis, arm, curve, f"C{color}")
        axis.set(title=group, xscale="log", xlabel="samples seen", ylabel="main metric, %")
        axis.legend(fontsize=7)
    figure.supxlabel(textwrap.fill(scaling["caveat"], 60 * columns), fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_curve(axis, arm, curve, color):
    """One arm: its points with the deviation over seeds, and its power law dashed."""
    fit, label = curve["fit"], arm
    if fit:
        label += ": exponent {}, R² {}, {} points".format(*fit_cells(fit))
        ends = np.array([curve["fitted"][0], curve["fitted"][-1]], float)
        axis.plot(ends, 100 * fit["factor"] * ends ** fit["exponent"], "--", color=color)
    samples, means, deviations = [], [], []
    for point in curve["points"]:
        samples.append(point["samples"])
        means.append(100 * point["mean"])
        deviations.append(100 * (point["sd"] or 0))
    axis.errorbar(samples, means, yerr=deviations, color=color, label=label, marker="o",
                  markersize=4, linewidth=1)


# ------------------------------------------------------------------------------ main


def read_arms(arguments):
    """Arguments NAME=FILE,FILE,... or FILE -> arms with their milestones, as for `scaling`."""
    arms, given = {}, set()
    for argument in arguments:
        name, equals, paths = argument.partition("=")
        if not equals or os.path.exists(argument):
            name, paths = "", argument
        seeds = {}  # {seed: {samples: (result, hits)}}
        for path in paths.split(","):
            if not path:
                raise ValueError(f"{argument}: a file's name is missing")
            file = os.path.realpath(path.removesuffix(".json"))
            if file in given:
                raise ValueError(f"{path}: given twice")
            given.add(file)
            result, hits = read_result(path)
            name = name or result["run"]
            seed = path if result["seed"] is None else result["seed"]
            milestones = seeds.setdefault(seed, {})
            if result["samples"] in milestones:
                raise ValueError(f"{path}: a second result of seed {seed} with the same "
                                 "samples; two runs of one seed are two arms")
            milestones[result["samples"]] = result, hits
        if name in arms:
            raise ValueError(f"{argument}: another arm is called {name}, too")
        in_order = []
        for seed in sorted(seeds, key=str):  # so that arms are paired whatever the order given
            in_order.append([seeds[seed][samples] for samples in sorted(seeds[seed])])
        arms[name] = {"name": name, "seeds": in_order}
    return list(arms.values())


def report(arms, rows, out):
    """Compare the newest result of each seed, draw the curves of all; write to `out`, print.

    arms: as for `scaling`.  rows: the list's.  An arm without samples (foreign) has no curve.
    """
    newest, trained, several = [], [], False
    for arm in arms:
        newest.append({"name": arm["name"], "runs": [seed[-1] for seed in arm["seeds"]]})
        first, _ = arm["seeds"][0][0]
        if first["samples"] is not None:
            trained.append(arm)
            several = several or any(len(seed) > 1 for seed in arm["seeds"])
    os.makedirs(out, exist_ok=True)
    comparison = compare(newest, rows)
    write_json(f"{out}/comparison.json", comparison)
    write_text(f"{out}/comparison.md", markdown(comparison, rows))
    print(markdown(comparison, rows))
    if not several:
        return
    curves = scaling(trained)
    write_json(f"{out}/scaling.json", curves)
    write_text(f"{out}/scaling.md", scaling_markdown(curves))
    print(scaling_markdown(curves))
    try:
        draw_scaling(curves, f"{out}/scaling.png")
    except ImportError:
        print("no scaling.png: it needs matplotlib (pip install matplotlib)")


def main(argv=None):
    config, arguments = load_config(Config, globals(), argv)
    from data.benchmarks import LISTS  # here, because it loads torch
    if config.list not in LISTS:
        raise ValueError(f"list={config.list}: must be {' or '.join(LISTS)}")
    if not arguments:
        raise ValueError("which results? For example: python -m data.results out/eval/a.json "
                         "out/eval/b.json --out=out/compared (--help says more)")
    report(read_arms(arguments), LISTS[config.list], config.out)


if __name__ == "__main__":
    run_main(main)
