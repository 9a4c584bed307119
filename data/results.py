"""Result files of evaluations, and what can honestly be said when runs are compared.

A run's result is <name>.json: checkpoint, sha256, step, samples, precision, versions, "missing"
rows, and "tasks": {set: {"family", "main", "metrics": {name: value in 0..1 or None}, "n", ...}}.
Beside it <name>.npz keeps the per-sample hits as "set/metric", so that two runs can be compared
sample by sample, also long after, and on another machine.

An arm is {"name", "runs": [(result, hits), ...]}: one run, or one for each seed. Comparisons are to
the first arm. Intervals are 95 %. Letters: n samples, u units drawn anew, B bootstrap draws.
"""
import json
import math
import os
import textwrap
import zlib
from collections import Counter

import numpy as np

FORMAT = "perceptual-clip results 1"
DRAWS = 2000  # bootstrap draws: the ends of an interval then jitter by about 3 % of its width
SAMPLES_CAVEAT = ("Intervals: 95 %, paired bootstrap over test samples (by class for mean "
                  "per-class recall, images with all their captions for retrieval). The variance "
                  "between training seeds is not in them.")
SEEDS_CAVEAT = ("± is the standard deviation over seeds; a second interval, after \"seeds\", is "
                "Student's t over seeds (paired where both arms have the same seeds).")
SIGN_CAVEAT = ("The sign test counts sets as independent and equal; sets that share images or "
               "labels (the ImageNet ones) are not, so its p is too small.")
CURVE_CAVEAT = ("Checkpoints of one cosine run are not independent budgets: a run that ends at n "
                "samples, its rate decayed, scores higher than a longer one passing n.")

# ------------------------------------------------------------------------------ files


def write_result(path, result, hits):
    """Write a result (dict) to path.json and hits {set: {name: array}} to path.npz, atomically."""
    arrays = {f"{name}/{metric}": array for name, arrays in hits.items()
              for metric, array in arrays.items()}
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
    """Read <path>.json and its .npz: (result, hits {set: {name: array}})."""
    path = str(path).removesuffix(".json")
    try:
        with open(f"{path}.json", encoding="utf-8") as file:
            result = json.load(file)
        if not isinstance(result, dict) or result.get("format") != FORMAT:
            raise ValueError(f"no format={FORMAT!r} in it")
        hits = {}
        with np.load(f"{path}.npz", allow_pickle=False) as arrays:
            for key in arrays.files:
                name, metric = key.rsplit("/", 1)
                hits.setdefault(name, {})[metric] = arrays[key]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename}: no such result file") from None
    except (ValueError, OSError, EOFError) as error:  # also a cut JSON and a cut archive
        raise ValueError(f"{path}.json: not a result of evaluate.py ({error}); remove it") from None
    return result, hits


# ------------------------------------------------------------------------------ paired bootstrap


def units(hits, metric):
    """What the bootstrap draws anew: (numerators (u,p), denominators (u,p), strata (u,) or None).

    The metric is the mean over p parts (and over strata) of sum(numerator) / sum(denominator).
    hits: one set's arrays.  None for a metric without a score per sample (average precision).
    """
    if metric == "mean_recall@1":
        parts = [units(hits, f"{side}_retrieval_recall@1")[:2] for side in ("image", "text")]
        return *(np.concatenate(part, axis=1) for part in zip(*parts)), None
    if metric not in hits:
        return None
    values = hits[metric].astype(float)  # (n,)
    if metric.startswith("image_retrieval"):  # a caption's hit belongs to its image
        owner = hits["image_of"]
        captions = np.bincount(owner).astype(float)
        return np.bincount(owner, values)[:, None], captions[:, None], None
    strata = hits["labels"] if metric == "mean_per_class_recall" else None
    return values[:, None], np.ones((len(values), 1)), strata


def paired_draws(hits_a, hits_b, metric, key, draws=DRAWS):
    """B bootstrap values (B,) of metric(b) - metric(a) on the same samples drawn anew.

    hits_a, hits_b: lists with one set's hits for each seed of an arm; an arm is its mean.
    key: names the draw, so that a comparison can be repeated.  None if the metric has no hits.
    Equal units are drawn together, as multinomial counts: exact, and 50,000 samples cost no more
    than their few distinct outcomes.
    """
    seeds_a, seeds_b = ([units(hits, metric) for hits in arm] for arm in (hits_a, hits_b))
    if None in seeds_a or None in seeds_b:
        return None
    _, denominators, strata = seeds_a[0]
    columns = [np.mean([seed[0] for seed in arm], axis=0) for arm in (seeds_a, seeds_b)]
    table, parts = np.concatenate([*columns, denominators], axis=1), denominators.shape[1]  # (u,3p)
    rng = np.random.default_rng(zlib.crc32(f"{key}/{metric}".encode()))
    groups = [table] if strata is None else [table[strata == c] for c in np.unique(strata)]
    total = np.zeros(draws)
    for group in groups:
        kinds, counts = np.unique(group, axis=0, return_counts=True)  # (kinds,3p)
        drawn = rng.multinomial(len(group), counts / len(group), size=draws)  # (B,kinds)
        a, b, whole = np.split(drawn @ kinds, [parts, 2 * parts], axis=1)  # (B,p) each
        total += ((b - a) / whole).mean(1)
    return total / len(groups)


def interval(draws):
    """The middle 95 % of bootstrap values, as [low, high]."""
    return [float(end) for end in np.percentile(draws, (2.5, 97.5))]


# 97.5 % points of Student's t for 1 to 30 degrees of freedom (any table of the distribution)
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
         2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
         2.052, 2.048, 2.045, 2.042)


def t975(freedom):
    """97.5 % point of Student's t; beyond 30 degrees of freedom 1.96 + 2.4/f, within 0.003."""
    return _T975[int(freedom) - 1] if freedom < 31 else 1.96 + 2.4 / freedom


def seed_statistics(values):
    """Mean of one value a seed, with standard deviation and 95 % t interval from two seeds on."""
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
    parts = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    error = math.sqrt(sum(parts))
    below = parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1)
    half = t975(max(1, error ** 4 // below) if below else 30) * error
    delta = b.mean() - a.mean()
    return [float(delta - half), float(delta + half)]


def sign_test(wins, losses):
    """Two-sided p of so uneven a split of wins and losses under fair coins; ties are dropped."""
    n, few = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2 ** n)


# ------------------------------------------------------------------------------ comparing arms


def compare(arms, rows=()):
    """All that is said about arms, as one JSON-able dict; deltas are to the first arm.

    rows: the Rows of the chosen list, in whose order sets are shown and of which K are counted.
    A set is compared if all arms have it that have any of its type (stage 1 has 2AFC only), in
    every seed. ValueError where their class names, templates or samples differ.
    """
    every = {name: task for arm in arms for result, _ in arm["runs"]
             for name, task in result["tasks"].items()}
    if not any(row.sets[0] in every for row in rows):
        rows = ()  # none of the list is here: its table would be all gaps
    sets, draws, partly = {}, {}, []
    for name in _ordered(every, rows):
        having = [arm for arm in arms if any(task["type"] == every[name]["type"] for result, _
                                             in arm["runs"] for task in result["tasks"].values())]
        runs = [result for arm in having for result, _ in arm["runs"]]
        if all(name in result["tasks"] for result in runs):
            _same_test(name, runs)
            sets[name], draws[name] = _compare_set(name, having, arms[0])
        else:
            partly.append(name)
    return {"format": "perceptual-clip comparison 1", "baseline": arms[0]["name"],
            "arms": {arm["name"]: [_origin(result) for result, _ in arm["runs"]] for arm in arms},
            "sets": sets, "families": _compare_families(sets, draws, arms, rows),
            "counts": _count_wins(sets, arms), "list": [row.sets[0] for row in rows],
            "not_in_every_run": partly, "bootstrap_draws": DRAWS,
            "caveats": [SAMPLES_CAVEAT, SEEDS_CAVEAT, SIGN_CAVEAT]}


def _origin(result):
    keys = ("run", "checkpoint", "sha256", "step", "samples", "seed", "precision")
    return {key: result.get(key) for key in keys}


def _ordered(tasks, rows):
    """Set names: the rows in their order, then the others by family and name, 2AFC last."""
    place = {row.sets[0]: i for i, row in enumerate(rows)}
    kind = {"retrieval": 1, "2afc": 2}
    return sorted(tasks, key=lambda name: (place.get(name, len(place)),
                                           kind.get(tasks[name]["type"], 0),
                                           tasks[name]["family"], name))


def _same_test(name, runs):
    """Refuse to compare runs that did not face the same names, templates and samples."""
    kinds = {"classnames_sha256": "class names", "templates_sha256": "templates",
             "samples_sha256": "samples"}
    for key, what in kinds.items():
        for other in runs[1:]:
            if other["tasks"][name].get(key) != runs[0]["tasks"][name].get(key):
                raise ValueError(f"{name}: {runs[0]['run']} and {other['run']} had different "
                                 f"{what}, so they cannot be compared; evaluate both on one folder")


def _compare_set(name, arms, base):
    """One set: values and deltas of the arms that have it; bootstrap draws of its main metric."""
    task = arms[0]["runs"][0][0]["tasks"][name]
    record = {key: task.get(key) for key in ("family", "type", "main", "n", "classes", "templates",
                                             "captions", "partial", "part_of")}
    record["arms"], main_draws = {}, {}
    hits = {arm["name"]: [found.get(name, {}) for _, found in arm["runs"]] for arm in arms}
    for arm in arms:
        record["arms"][arm["name"]] = values = {}
        for metric in (key for key, value in task["metrics"].items() if value is not None):
            here = _by_seed(arm, name, metric)
            values[metric] = seed_statistics(here)
            if arm is base or base not in arms:
                continue
            drawn = paired_draws(hits[base["name"]], hits[arm["name"]], metric, name)
            values[metric].update(_delta(_by_seed(base, name, metric), here, drawn, base, arm))
            if metric == task["main"]:
                main_draws[arm["name"]] = drawn
    return record, main_draws


def _by_seed(arm, name, metric):
    return [result["tasks"][name]["metrics"][metric] for result, _ in arm["runs"]]


def _delta(there, here, drawn, base, arm):
    """Difference of an arm to the baseline with both kinds of interval; one value a seed each."""
    seeds, base_seeds = ([result["seed"] for result, _ in a["runs"]] for a in (arm, base))
    paired = seeds == base_seeds and None not in seeds and len(set(seeds)) == len(seeds)
    return {"delta": float(np.mean(here) - np.mean(there)),
            "delta_interval": None if drawn is None else interval(drawn),
            "delta_seed_interval": seed_interval(there, here, paired)}


def _compare_families(sets, draws, arms, rows):
    """Means of the main metric over each family, and over all classification sets: k of K.

    With a list, its families and the mean of all are over the sets of the list alone.
    """
    listed, of = {row.sets[0] for row in rows}, Counter(row.family for row in rows)
    whole = "all classification"
    of[whole] = sum(row.main != "mean_recall@1" for row in rows)
    members = {family: [] for family, count in of.items() if count}
    for name, record in sets.items():
        if name in listed or record["family"] not in of and not record["part_of"]:
            members.setdefault(record["family"], []).append(name)  # NIGHTS' halves are in its total
        if (name in listed or not listed) and record["type"] == "classification":
            members.setdefault(whole, []).append(name)
    return {family: {"k": len(names), "K": of[family] or len(names), "sets": names,
                     "arms": _family_arms(names, sets, draws, arms)}
            for family, names in sorted(members.items(), key=lambda item: item[0] == whole)}


def _family_arms(names, sets, draws, arms):
    """Values and deltas of the mean over sets, for the arms that have them."""
    def by_seed(arm):
        return np.mean([_by_seed(arm, name, sets[name]["main"]) for name in names], axis=0).tolist()
    having = [arm for arm in arms if names and arm["name"] in sets[names[0]]["arms"]]
    values = {}
    for arm in having:
        values[arm["name"]] = seed_statistics(by_seed(arm))
        if arm is not arms[0] and arms[0] in having:
            parts = [draws[name][arm["name"]] for name in names]
            drawn = None if any(part is None for part in parts) else np.mean(parts, axis=0)
            values[arm["name"]].update(_delta(by_seed(arms[0]), by_seed(arm), drawn, arms[0], arm))
    return values


RECALLS = tuple(f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10))


def _count_wins(sets, arms):
    """Wins, ties and losses of each later arm against the first, by kind of metric."""
    kinds = {"main metric": None, "top-1": ("acc1",), "top-5": ("acc5",), "recalls": RECALLS}
    counts = {}
    for arm in arms[1:]:
        counts[arm["name"]] = {}
        for kind, metrics in kinds.items():
            found = [record["arms"].get(arm["name"], {}).get(metric, {})
                     for record in sets.values() if record["type"] != "2afc"
                     for metric in metrics or (record["main"],)]
            counts[arm["name"]][kind] = _tally([value for value in found if "delta" in value])
    return counts


def _tally(found):
    wins, losses = (sum(sign * value["delta"] > 0 for value in found) for sign in (1, -1))
    clear = [value["delta_interval"] for value in found if value["delta_interval"]]
    return {"compared": len(found), "wins": wins, "ties": len(found) - wins - losses,
            "losses": losses, "clear_wins": sum(low > 0 for low, _ in clear),
            "clear_losses": sum(high < 0 for _, high in clear),
            "sign_test_p": sign_test(wins, losses)}


# ------------------------------------------------------------------------------ Markdown


def table(header, rows):
    """A Markdown table with aligned columns; the first column is text, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0])]
                               + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:])]) + " |"
             for row in cells]
    rule = "|" + "-" * (widths[0] + 2) + "|" + "".join("-" * (w + 1) + ":|" for w in widths[1:])
    return "\n".join([lines[0], rule, *lines[1:]])


_SHORT = {"mean_per_class_recall": "mpcr", "mean_average_precision": "mAP", "mean_recall@1": "R@1"}


def markdown(comparison, rows=()):
    """The comparison as Markdown that can be pasted: sets, family means, wins, caveats. In %.

    rows: the list's; if any of them is there, all are shown, with what is published beside them.
    """
    arms, sets = list(comparison["arms"]), comparison["sets"]
    rows = {row.sets[0]: row for row in rows} if comparison["list"] else {}
    header = ["set", "family", "n", "metric", *arms]
    if rows:  # top-1/top-5 (recall@1 both ways) of one run beside what CLIP_benchmark published
        header += ["top-1/top-5", "OpenAI B/32"] if len(arms) == 1 else ["OpenAI B/32"]
    lines = []
    for name in dict.fromkeys([*rows, *sets]):
        record, title = sets.get(name), rows[name].title if name in rows else name
        if record is None:
            cells = [title, rows[name].family, "", "", *["missing"] * len(arms)]
        else:
            main = record["main"]
            cells = [title + " (partial)" * bool(record["partial"]), record["family"],
                     f"{record['n']:,}", _SHORT.get(main, main)]
            cells += [_cell(record["arms"].get(arm, {}).get(main)) for arm in arms]
        if rows and len(arms) == 1:
            cells.append(_pair(record and record["arms"][arms[0]]))
        lines.append(cells + [_published(rows.get(name))] * bool(rows))
    text = [table(header, lines), "", _family_table(comparison, arms)]
    if any(count["compared"] for kinds in comparison["counts"].values()
           for count in kinds.values()):
        text += ["", f"Differences are to {comparison['baseline']}, in points.", "",
                 _count_table(comparison)]
    if len(arms) > 1:
        several = any(len(runs) > 1 for runs in comparison["arms"].values())
        text += ["", SAMPLES_CAVEAT, *[SEEDS_CAVEAT] * several, SIGN_CAVEAT]
    if comparison["not_in_every_run"]:
        text += ["", "Not in every run, so left out: "
                 + ", ".join(comparison["not_in_every_run"]) + "."]
    return "\n".join(text) + "\n"


def _cell(value):
    """A value, with its spread over seeds, and its delta with intervals, in % and points."""
    if value is None:
        return "-"
    text = f"{100 * value['mean']:.1f}"
    if value["sd"] is not None:
        text += f" ± {100 * value['sd']:.1f}"
    if "delta" in value:
        text += f" ({100 * value['delta']:+.1f}"
        if value["delta_interval"]:
            text += " [{:+.1f}, {:+.1f}]".format(*(100 * end for end in value["delta_interval"]))
        if value["delta_seed_interval"]:
            text += " seeds [{:+.1f}, {:+.1f}]".format(
                *(100 * end for end in value["delta_seed_interval"]))
        text += ")"
    return text


def _pair(metrics):
    """acc1/acc5 in %, or for retrieval recall@1 of text to image / image to text."""
    values = [metrics[name]["mean"] for name in ("acc1", "acc5", RECALLS[0], RECALLS[3])
              if name in metrics] if metrics else []
    return "/".join(f"{100 * value:.1f}" for value in values)


def _published(row):
    """The same pair as CLIP_benchmark published it for OpenAI's ViT-B/32; - where it did not."""
    if row is None or row.published[0] is None:
        return ""
    pair = row.published[::2] if row.family == "retrieval" else row.published
    return "/".join("-" if value is None else f"{value:.1f}" for value in pair)


def _family_table(comparison, arms):
    lines = []
    for family, mean in comparison["families"].items():
        cells = [_cell(mean["arms"].get(arm)) if mean["k"] else "missing" for arm in arms]
        lines.append([family, f"{mean['k']} of {mean['K']}", *cells])
    return table(["mean of main metrics", "sets", *arms], lines)


def _count_table(comparison):
    lines = [[arm, kind, count["compared"], count["wins"], count["ties"], count["losses"],
              f"{count['clear_wins']} / {count['clear_losses']}", f"{count['sign_test_p']:.2g}"]
             for arm, kinds in comparison["counts"].items() for kind, count in kinds.items()
             if count["compared"]]
    return table(["arm", "metric", "compared", "wins", "ties", "losses",
                  "clear of 0: wins / losses", "sign test p"], lines)


# ------------------------------------------------------------------------------ scaling


def fit_power_law(samples, values):
    """Least squares of log(value) on log(samples): value = factor * samples ** exponent.

    Returns exponent, factor, r2, interval (95 %, Student's t, from three points on), points; None
    below two points or where a value is not positive.
    """
    if len(samples) < 2 or min(values) <= 0:
        return None
    x, y = np.log(samples), np.log(values)
    spread = ((x - x.mean()) ** 2).sum()
    exponent = ((x - x.mean()) * (y - y.mean())).sum() / spread
    rest = ((y - y.mean() - exponent * (x - x.mean())) ** 2).sum()
    whole = ((y - y.mean()) ** 2).sum()
    ends = None
    if len(x) > 2:
        half = t975(len(x) - 2) * math.sqrt(rest / (len(x) - 2) / spread)
        ends = [float(exponent - half), float(exponent + half)]
    return {"exponent": float(exponent), "factor": float(np.exp(y.mean() - exponent * x.mean())),
            "r2": float(1 - rest / whole) if whole else 1.0, "interval": ends, "points": len(x)}


def samples_to_reach(points, target):
    """Samples at which a curve [(samples, value)] first reaches target, log-linear in between."""
    before = None
    for samples, value in points:
        if value >= target:
            if before is None or before[0] == 0:
                return float(samples)
            share = (target - before[1]) / (value - before[1])
            return float(before[0] * (samples / before[0]) ** share)
        before = samples, value
    return None


def chance(task):
    """Expected main metric of guessing and its standard error over n samples; None for mAP."""
    kinds = {"classification": lambda: 1 / task["classes"], "retrieval": lambda: 1 / task["n"],
             "2afc": lambda: 0.5}
    if task["type"] not in kinds:
        return None
    p = kinds[task["type"]]()
    return p, math.sqrt(p * (1 - p) / task["n"])


def scaling(arms):
    """Metric against samples seen: each family's and set's curve, fit, and samples to the baseline.

    arms: like compare's, but an arm's runs are the milestones of all its seeds, {"name", "seeds":
    [[(result, hits), ...by samples], ...]}.  A point is the mean over seeds that all have it.
    Left out of everything: sets within two standard errors of chance at the end of any arm.
    """
    ends = [seed[-1][0] for arm in arms for seed in arm["seeds"]]
    tasks = {name: task for name, task in ends[0]["tasks"].items()
             if all(name in result["tasks"] for arm in arms for seed in arm["seeds"]
                    for result, _ in seed)}
    left_out = {name for name, task in tasks.items() if chance(task) and any(
        end["tasks"][name]["metrics"][task["main"]] < chance(task)[0] + 2 * chance(task)[1]
        for end in ends)}
    groups = {}
    for name, task in tasks.items():
        if name not in left_out:
            groups[name] = [name]
            if not task.get("part_of"):
                groups.setdefault(f"mean of {task['family']}", []).append(name)
            if task["type"] == "classification":
                groups.setdefault("mean of all classification", []).append(name)
    curves = {group: _curves(names, arms) for group, names in sorted(groups.items())}
    return {"format": "perceptual-clip scaling 1", "baseline": arms[0]["name"],
            "caveat": CURVE_CAVEAT, "near_chance": sorted(left_out), "curves": curves}


def _curves(names, arms):
    curves = {}
    for arm in arms:
        per_seed = [{result["samples"]: np.mean([result["tasks"][name]["metrics"][
            result["tasks"][name]["main"]] for name in names]) for result, _ in seed}
            for seed in arm["seeds"]]
        shared = sorted(set.intersection(*map(set, per_seed)))
        points = [(samples, seed_statistics([seed[samples] for seed in per_seed]))
                  for samples in shared]
        warm = arm["seeds"][0][-1][0].get("warmup_samples") or 0
        used = [(samples, point["mean"]) for samples, point in points if samples > warm]
        curves[arm["name"]] = {
            "points": [{"samples": samples, **point} for samples, point in points],
            "warmup_samples": warm, "fit": fit_power_law(*zip(*used)) if used else None,
            "fitted": [samples for samples, _ in used]}
    final = curves[arms[0]["name"]]["points"][-1]["mean"]
    for curve in curves.values():
        reached = samples_to_reach([(p["samples"], p["mean"]) for p in curve["points"]], final)
        curve["samples_to_baseline"] = reached
    return curves


def scaling_markdown(scaling):
    """The fits of the means over sets as a Markdown table, with the caveat."""
    lines = []
    for group, arms in scaling["curves"].items():
        for arm, curve in arms.items() if group.startswith("mean of") else ():
            fit, reached = curve["fit"], curve["samples_to_baseline"]
            lines.append([group, arm, f"{100 * curve['points'][-1]['mean']:.1f}",
                          *_fit_cells(fit), f"{reached:,.0f}" if reached else "not reached"])
    header = ["curve", "arm", "final, %", "exponent", "R²", "points",
              f"samples to final of {scaling['baseline']}"]
    near = ", ".join(scaling["near_chance"]) or "none"
    return f"{table(header, lines)}\n\nToo near chance to be fitted: {near}.\n{scaling['caveat']}\n"


def _fit_cells(fit):
    """Exponent with its interval, R², and how many points were used."""
    if fit is None:
        return ["-"] * 3
    ends = " [{:.3f}, {:.3f}]".format(*fit["interval"]) if fit["interval"] else ""
    return [f"{fit['exponent']:.3f}{ends}", f"{fit['r2']:.3f}", fit["points"]]


def draw_scaling(scaling, path):
    """The curves of `scaling` as a PNG: a panel for each mean over sets, the caveat below."""
    import matplotlib  # optional: the caller says what to install
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [group for group in scaling["curves"] if group.startswith("mean of")]
    columns = max(1, min(3, len(groups)))
    rows = max(1, -(-len(groups) // columns))
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.4 * columns, 3.2 * rows + 0.6),
                                   squeeze=False, layout="constrained")
    for axis in axes.flat[len(groups):]:
        axis.axis("off")
    for group, axis in zip(groups, axes.flat):
        for color, (arm, curve) in enumerate(scaling["curves"][group].items()):
            _draw_curve(axis, arm, curve, f"C{color}")
        axis.set(title=group, xscale="log", xlabel="samples seen", ylabel="main metric, %")
        axis.legend(fontsize=7)
    figure.supxlabel("\n".join(textwrap.wrap(scaling["caveat"], 60 * columns)), fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_curve(axis, arm, curve, color):
    """One arm: its points with the deviation over seeds, and its power law dashed."""
    points, fit = curve["points"], curve["fit"]
    if fit:
        arm += ": exponent {}, R² {}, {} points".format(*_fit_cells(fit))
        ends = np.array([curve["fitted"][0], curve["fitted"][-1]], float)
        axis.plot(ends, 100 * fit["factor"] * ends ** fit["exponent"], "--", color=color)
    axis.errorbar([point["samples"] for point in points], [100 * point["mean"] for point in points],
                  yerr=[100 * (point["sd"] or 0) for point in points], color=color, label=arm,
                  marker="o", markersize=4, linewidth=1)
