"""Compares runs by their result files: paired intervals, wins, means of families, curves.

    python -m data.results base=out/b0.json,out/b1.json pi=out/p0.json,out/p1.json --out=out/x

An argument is an arm, NAME=FILES; a file alone is an arm called like its run. Differences are
to the first. Results of one seed are milestones of one run: the newest is compared, all make
its curve. Results without a seed, as of foreign weights, are runs of their own. Writes
comparison.json, .md and .png and, if there are milestones, scaling.json, .md and .png.

evaluate.py writes a result as <name>.json, with each sample's hits in <name>.npz.
Letters: n samples, u units drawn anew, p parts of a metric, B draws.
"""
import json
import math
import os
import platform
import re
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from configs import load_config  # before torch: see there
import numpy as np

from data import plots
from data.benchmarks import LISTS
from data.log import run_main, write_text

FORMAT = "perceptual-clip results 1"
DRAWS = 2000  # bootstrap draws: the ends of an interval then jitter by about 3 % of its width
PUBLISHED = ("acc1", "acc5", "image_retrieval_recall@1", "image_retrieval_recall@5",
             "text_retrieval_recall@1", "text_retrieval_recall@5")
CAVEATS = [
    "Intervals: 95 %, paired bootstrap over test samples; training seeds vary beyond them.",
    "± is the deviation over seeds; after \"seeds\": Student's t over the seeds of both arms.",
    "The sign test's p is too small where sets share images or labels (the ImageNet ones)."]
CURVE_CAVEAT = (
    "Checkpoints of one cosine run are not independent budgets: a run that ends at n samples, "
    "its rate decayed, scores higher than a longer one passing n.")


@dataclass
class Config:
    out: str = "out/compared"  # folder of what is written


def write_result(path, result, hits):
    """Write a result to path.json and hits {set: {metric: array}} to path.npz, atomically."""
    arrays = {}
    for name, found in hits.items():
        for metric, array in found.items():
            arrays[f"{name}/{metric}"] = array
    np.savez_compressed(f"{path}.tmp.npz", **arrays)
    os.replace(f"{path}.tmp.npz", f"{path}.npz")
    write_json(f"{path}.json", result)  # after its arrays: a task in the JSON has them


def write_json(path, content):
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_result(path):
    """Read <path>.json and its .npz: (result, hits {set: {metric: array}})."""
    path, hits = str(path).removesuffix(".json"), {}
    try:
        with open(f"{path}.json", encoding="utf-8") as file:
            result = json.load(file)
        if not isinstance(result, dict) or result.get("format") != FORMAT:
            raise ValueError(f"no format={FORMAT!r} in it")
        with np.load(f"{path}.npz") as arrays:
            for key in arrays:
                name, metric = key.rsplit("/", 1)
                hits.setdefault(name, {})[metric] = arrays[key]
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}.json: not a result of evaluate.py, or not whole ({error}); "
                         "leave it out; if evaluate.py is to make it anew, remove it") from None
    return result, hits


def read_arguments(arguments, read_checkpoint):
    """[NAME=]checkpoint, [NAME=]folder ... -> {run: {result's name: checkpoint}}, by samples.

    A run's last result is called like it, a milestone before it NAME@SAMPLES.
    read_checkpoint: model.read_checkpoint, asked how many samples the last one has seen.
    """
    runs, taken = {}, ["comparison", "scaling"]  # our other files in --out
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or "/" in name:
            name, path = "", argument
        name = name or run_name(path)
        runs[name] = milestones(name, path, read_checkpoint)
        for result in runs[name]:
            if result in taken:
                raise ValueError(f"{argument}: a result is called {result} already; give "
                                 "another name by NAME=checkpoint")
            taken.append(result)
    return runs


def run_name(path):
    """out/toy, out/toy/ckpt.pt -> toy; out/toy/best.pt -> toy-best; ViT-B-32.pt -> ViT-B-32;
    out/toy/samples_000000064000.pt -> toy@64000; random:toy -> random-toy."""
    file = Path(os.path.abspath(path))
    ours = re.fullmatch(r"(ckpt|best|samples_0*(\d+))\.pt", file.name)
    if ours is None:
        return file.name.removesuffix(".pt").replace(":", "-")
    return file.parent.name + {"ckpt": "", "best": "-best"}.get(ours[1], f"@{ours[2]}")


def milestones(name, path, read_checkpoint):
    """{result's name: checkpoint} of a run's folder, by samples; of anything else, itself."""
    if not path.startswith("random:") and not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if path.endswith(".json"):
        raise ValueError(f"{path}: is no checkpoint; python -m data.results compares results")
    last = os.path.join(path, "ckpt.pt")
    if not os.path.isfile(last):
        return {name: path}  # also a folder as Hugging Face has them
    end = read_checkpoint(last)["samples"]
    found = {}
    for file in sorted(Path(path).glob("samples_[0-9]*.pt")):  # 12 digits: in order of samples
        samples = int(file.stem.removeprefix("samples_"))
        if samples != end:  # the newest is often a milestone as well
            found[f"{name}@{samples}"] = str(file)
    return found | {name: last}


def begin_result(run, model, config):
    """The earlier result of this run if it is of the same weights, else an empty one.

    model, config: evaluate.Model and evaluate.Config.
    """
    versions = {package: version(package) for package in ("torch", "numpy", "pillow")}
    versions["python"] = platform.python_version()
    info, settings = model.info, model.info["config"]
    warmup_samples = settings.get("warmup_steps", 0) * settings.get("batch_size", 0)
    result = {"format": FORMAT, "run": run, "checkpoint": model.path, "step": info["step"],
              "samples": info["samples"], "seed": settings.get("seed"),
              "warmup_samples": warmup_samples, "sha256": info["sha256"],
              "kind": "clip" if model.clip else "vision", "source": info["format"],
              "device": str(model.device), "precision": config.dtype,
              "quick_gelu": model.vision.config.quick_gelu, "list": config.list,
              "versions": versions, "missing": [], "tasks": {}}
    path = os.path.join(config.out, run)
    if os.path.exists(f"{path}.json"):
        earlier, hits = read_result(path)
        if all(earlier[key] == result[key] for key in ("sha256", "precision", "quick_gelu")):
            return result | {"tasks": earlier["tasks"]}, hits
    return result, {}


def finished(result, jobs):
    """Names of the jobs whose task the result has, done on the same samples and prompts."""
    done = []
    for name, job in jobs.items():
        if job.fingerprints.items() <= result["tasks"].get(name, {}).items():
            done.append(name)
    return done


def describe(run, tasks):
    """A line for each finished task: every metric in %."""
    lines = []
    for name, task in tasks.items():
        figures = []
        for metric, value in task["metrics"].items():
            if value is not None:
                figures.append(f"{metric} {100 * value:.1f}")
        lines.append(f"{run}: {name}: {'  '.join(figures)}  (n {task['n']:,}, "
                     f"{task['seconds']:.1f} s)")
    return "\n".join(lines)


def keep_result(folder, result, hits, rows):
    """Write what there is so far, with the sets of `rows` that are still missing."""
    names = [row.sets[0] for row in rows]
    result["missing"] = [name for name in names if name not in result["tasks"]]
    write_result(os.path.join(folder, result["run"]), result, hits)


# ------------------------------------------------------------------------------ intervals


def units(seeds, metric):
    """What the bootstrap draws anew, (2,u,p): hits, mean over seeds, and number of samples."""
    if metric == "mean_recall@1":
        ways = [units(seeds, f"{way}_retrieval_recall@1") for way in ("image", "text")]
        return np.concatenate(ways, axis=2)   # two of (2,u,1) -> (2,u,2)
    unit_of = np.arange(len(seeds[0][metric]))
    if metric.startswith("image_retrieval"):  # an image is drawn with all its captions
        unit_of = seeds[0]["image_of"]
    hits = np.mean([np.bincount(unit_of, one[metric]) for one in seeds], axis=0)
    return np.stack([hits, np.bincount(unit_of)])[:, :, None]


def paired_draws(hits_a, hits_b, metric, key, draws=DRAWS):
    """B bootstrap values (B,) of metric(b) - metric(a) on the same samples; None without hits.

    hits_a, hits_b: one set's hits of each seed.  key: the draw's name, to repeat it.
    """
    if not hits_a[0] or not hits_b[0]:  # average precision is no mean over samples
        return None
    right_a, whole = units(hits_a, metric)                                  # (u,p) each
    right_b, whole = units(hits_b, metric)
    table = np.hstack([right_a, right_b, whole])                            # (u,3p)
    classes = np.zeros(len(table))  # the recall per class draws within each class
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


# 97.5 % points of Student's t for 1 to 30 degrees of freedom; SciPy would be a fifth package.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
        2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def t975(freedom):
    """97.5 % point of Student's t; beyond 30 degrees of freedom 1.96 + 2.4/f, within 0.003."""
    return T975[int(freedom) - 1] if freedom < 31 else 1.96 + 2.4 / freedom


def seed_statistics(values):
    """Mean of one value a seed, with standard deviation and t interval from two seeds on."""
    n, mean, sd, ends = len(values), float(np.mean(values)), None, None
    if n > 1:
        sd = float(np.std(values, ddof=1))
        half = t975(n - 1) * sd / math.sqrt(n)
        ends = [mean - half, mean + half]
    return {"mean": mean, "seeds": n, "sd": sd, "interval": ends}


def sign_test(wins, losses):
    """Two-sided p of so uneven a split of wins and losses under fair coins, without ties."""
    n, few = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2 ** n)


# ------------------------------------------------------------------------------ comparing


def compare(arms, rows=()):
    """All that is said about arms, as one JSON-able dict.

    arms: [{"name", "runs": [(result, hits) of each seed]}], the first is the baseline.
    rows: those of the paper's list. A set is compared if every run has it of the arms that have
    any set of its type: a stage-1 tower has judgements only.
    """
    origins, tasks, found, types = {}, {}, Counter(), set()
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

    def place(name):  # the list's first, then retrieval, probes and 2AFC
        place_in_list = listed.index(name) if name in listed else len(listed)
        kind = {"retrieval": 1, "probe": 2, "2afc": 3}.get(tasks[name]["type"], 0)
        return place_in_list, kind, tasks[name]["family"], name

    sets, left_out = {}, []
    for name in sorted(tasks, key=place):
        having = [arm for arm in arms if (arm["name"], tasks[name]["type"]) in types]
        if found[name] == sum(len(arm["runs"]) for arm in having):
            sets[name] = compare_set(name, having, arms[0])
        else:
            left_out.append(name)
    return {"format": "perceptual-clip comparison 1", "baseline": arms[0]["name"],
            "arms": origins, "sets": sets, "families": compare_families(sets, arms, rows),
            "counts": {arm["name"]: count_wins(sets, arm["name"]) for arm in arms[1:]},
            "list": listed, "not_in_every_run": left_out, "bootstrap_draws": DRAWS,
            "caveats": CAVEATS}


def compare_set(name, arms, base):
    """One set: what it is, and every metric of every arm; ValueError if their tests differ."""
    first, _ = arms[0]["runs"][0]
    task = first["tasks"][name]
    for arm in arms:
        for result, _ in arm["runs"]:
            for what in ("classnames", "templates", "samples"):
                if result["tasks"][name].get(f"{what}_sha256") != task.get(f"{what}_sha256"):
                    raise ValueError(f"{name}: {first['run']} and {result['run']} had "
                                     f"different {what}; evaluate both on one folder")
    about = ("family", "type", "main", "n", "classes", "templates", "captions", "partial",
             "part_of", "pixels")
    record = {key: task.get(key) for key in about}
    record["arms"] = {arm["name"]: {} for arm in arms}
    for metric, value in task["metrics"].items():
        if value is not None:  # top-5 of fewer than five classes
            for arm, statistics in compare_mean([name], metric, arms, base).items():
                record["arms"][arm][metric] = statistics
    return record


def compare_mean(names, metric, arms, base):
    """Mean over sets of a metric (None: the main ones) of each arm, with delta to base."""
    means, base_scores, base_seeds = {}, None, None
    for arm in arms:
        seeds = [result["seed"] for result, _ in arm["runs"]]
        scores, drawn = [], []
        for name in names:
            tasks = [result["tasks"][name] for result, _ in arm["runs"]]
            chosen = metric or tasks[0]["main"]
            scores.append([task["metrics"][chosen] for task in tasks])
            if base_seeds:
                hits_a = [hits.get(name) for _, hits in base["runs"]]
                hits_b = [hits.get(name) for _, hits in arm["runs"]]
                drawn.append(paired_draws(hits_a, hits_b, chosen, name))
        scores = np.mean(scores, axis=0)                                    # (seeds,)
        means[arm["name"]] = value = seed_statistics(scores)
        if arm is base:
            base_scores, base_seeds = scores, seeds
        if arm is base or not base_seeds:  # the baseline has no sets of this type
            continue
        known = all(one is not None for one in drawn)
        paired = seeds == base_seeds and None not in seeds
        value["delta"] = float(scores.mean() - base_scores.mean())
        value["delta_interval"] = interval(np.mean(drawn, axis=0)) if known else None
        value["delta_seed_interval"] = None
        if paired:
            value["delta_seed_interval"] = seed_statistics(scores - base_scores)["interval"]
    return means


def compare_families(sets, arms, rows):
    """Means of main metrics over families and all classification: k of the list's K sets."""
    listed = [row.sets[0] for row in rows]
    sizes = Counter(row.family for row in rows)
    members, classification = {family: [] for family in sizes}, []
    for name, record in sets.items():
        own = record["family"] not in sizes and not record["part_of"]  # not NIGHTS' halves
        if name in listed or own:
            members.setdefault(record["family"], []).append(name)
        if record["type"] == "classification" and (name in listed or not rows):
            classification.append(name)
    if rows or classification:
        members["all classification"] = classification
        sizes["all classification"] = sum(row.main != "mean_recall@1" for row in rows)
    families = {}
    for family, names in members.items():
        having = [arm for arm in arms if names and arm["name"] in sets[names[0]]["arms"]]
        families[family] = {"k": len(names), "K": sizes[family] or len(names), "sets": names,
                            "arms": compare_mean(names, None, having, arms[0])}
    return families


def count_wins(sets, arm):
    """Wins, ties and losses of an arm against the first, by kind of metric.

    Judgements and probes are no benchmarks, and are not counted.
    """
    counts = {}
    for kind, word in (("main metric", ""), ("top-1", "acc1"), ("top-5", "acc5"),
                       ("recalls", "retrieval_recall@")):
        signs = []
        for record in sets.values():
            for metric, value in record["arms"].get(arm, {}).items():
                chosen = (word or record["main"]) in metric and "delta" in value
                if chosen and record["type"] not in ("2afc", "probe"):
                    low, high = value["delta_interval"] or (0, 0)
                    signs.append([value["delta"] > 0, value["delta"] < 0, low > 0, high < 0])
        sums = np.array(signs, int).reshape(-1, 4).sum(axis=0).tolist()
        wins, losses, clear_wins, clear_losses = sums
        counts[kind] = {"compared": len(signs), "wins": wins,
                        "ties": len(signs) - wins - losses, "losses": losses,
                        "clear_wins": clear_wins, "clear_losses": clear_losses,
                        "sign_test_p": sign_test(wins, losses)}
    return counts


def table(header, rows):
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    widths = [3] * len(header)
    for row in (header, *rows):
        widths = [max(width, len(str(cell))) for width, cell in zip(widths, row)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    rule[0] = "-" * widths[0]
    lines = []
    for row in (header, rule, *rows):
        cells = [str(cell).rjust(width) for cell, width in zip(row, widths)]
        cells[0] = str(row[0]).ljust(widths[0])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(comparison, rows=()):
    """The comparison as Markdown, in %; rows: of the list, shown with what is published."""
    arms, lines, wins = comparison["arms"], [], []
    for family, mean in comparison["families"].items():
        cells = [value_cell(mean["arms"].get(arm)) for arm in arms]
        lines.append([family, f"{mean['k']} of {mean['K']}", *cells])
    parts = [set_table(comparison, rows if comparison["list"] else ()),
             table(["mean of main metrics", "sets", *arms], lines)]
    for arm, kinds in comparison["counts"].items():
        for kind, count in kinds.items():
            count = count | {"sign_test_p": f"{count['sign_test_p']:.2g}"}
            wins.append([arm, kind, *count.values()])
    if wins:
        parts += [f"Differences are to {comparison['baseline']}, in points.",
                  table(["arm", "metric", *count], wins), "\n".join(comparison["caveats"])]
    if comparison["not_in_every_run"]:
        names = ", ".join(comparison["not_in_every_run"])
        parts.append(f"Not in every run, so left out: {names}.")
    return "\n\n".join(parts) + "\n"


def set_table(comparison, rows):
    """A line for each row of the list and each other set; beside the list what is published."""
    arms, sets = list(comparison["arms"]), comparison["sets"]
    header = ["set", "family", "n", "metric", *arms]
    if rows:
        header += [f"{arms[0]}: top-1/5 or R@1/5", "OpenAI B/32"]
    row_of, lines = {row.sets[0]: row for row in rows}, []
    for name in row_of | sets:
        row = row_of.get(name)
        record = sets.get(name) or {**row._asdict(), "arms": {}, "partial": False}
        title = row.title if row else name
        if record["partial"]:
            title += " (partial)"
        line = [title, record["family"], record["n"], record["main"]]
        for arm in arms:
            line.append(value_cell(record["arms"].get(arm, {}).get(record["main"])))
        if rows:
            metrics = record["arms"].get(arms[0], {})
            ours = []
            for key in PUBLISHED:
                if key in metrics:
                    ours.append(f"{100 * metrics[key]['mean']:.1f}")
            theirs = map(str, row.published) if row else ()
            line += ["/".join(ours), "/".join(theirs).replace("None", "-")]
        lines.append(line)
    return table(header, lines)


def value_cell(value):
    """Mean ± deviation over seeds (delta), intervals over samples and seeds; % and points."""
    if value is None:
        return "missing"
    text = f"{100 * value['mean']:.1f}"
    if value["sd"] is not None:
        text += f" ± {100 * value['sd']:.1f}"
    if "delta" in value:
        text += f" ({100 * value['delta']:+.1f})"
    for word, key in (("", "delta_interval"), (" seeds", "delta_seed_interval")):
        if value.get(key):
            low, high = value[key]
            text += f"{word} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return text


# ------------------------------------------------------------------------------ scaling
# Here an arm holds milestones: {"name", "seeds": [[(result, hits), ...by samples], ...]}.


def fit_power_law(samples, values):
    """Least squares of log(value) on log(samples); None below two points or values <= 0."""
    if len(samples) < 2 or min(values) <= 0:
        return None
    n, x, y, ends = len(samples), np.log(samples), np.log(values), None
    dx, dy = x - x.mean(), y - y.mean()
    exponent = (dx * dy).sum() / (dx ** 2).sum()
    rest, whole = ((dy - exponent * dx) ** 2).sum(), (dy ** 2).sum()
    if n > 2:
        half = t975(n - 2) * math.sqrt(rest / (n - 2) / (dx ** 2).sum())
        ends = [float(exponent - half), float(exponent + half)]
    factor = np.exp(y.mean() - exponent * x.mean())
    return {"exponent": float(exponent), "factor": float(factor),
            "r2": float(1 - rest / whole) if whole else 1.0, "interval": ends, "points": n}


def samples_to_reach(points, target):
    """Samples at which a curve's points first reach target, log-linear in between, or None."""
    for before, point in zip([None, *points], points):
        if point["mean"] >= target:
            if before is None or before["samples"] == 0:
                return float(point["samples"])
            share = (target - before["mean"]) / (point["mean"] - before["mean"])
            return float(before["samples"] * (point["samples"] / before["samples"]) ** share)
    return None


def chance(task):
    """What guessing gives in the main metric; 0 for average precision."""
    choices = {"classification": task["classes"], "probe": task["classes"],
               "retrieval": task["n"], "2afc": 2}
    return 1 / choices.get(task["type"], math.inf)


def near_chance(task):
    """Whether a main metric is below guessing plus two standard errors; never for mAP."""
    p = chance(task)
    return task["metrics"][task["main"]] < p + 2 * math.sqrt(p * (1 - p) / task["n"])


def scaling(arms):
    """Metric against samples, for each family and set: curve, fit, samples to the baseline.

    A point is the mean over seeds that all have it.  Sets that a result lacks have no curve;
    sets near chance at the end of any run are left out of everything.
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
    curves, guess = {}, {}
    for group in sorted(groups):
        guess[group] = float(np.mean([chance(ends[0][name]) for name in groups[group]]))
        curves[group] = {arm["name"]: curve_of(arm, groups[group]) for arm in arms}
        final = curves[group][arms[0]["name"]]["points"][-1]["mean"]
        for curve in curves[group].values():
            curve["samples_to_baseline"] = samples_to_reach(curve["points"], final)
    return {"format": "perceptual-clip scaling 1", "baseline": arms[0]["name"],
            "caveat": CURVE_CAVEAT, "near_chance": sorted(left_out), "chance": guess,
            "curves": curves}


def curve_of(arm, names):
    """Mean of the sets' main metrics against samples, and its power law after the warm-up."""
    values = {}  # {samples: one value a seed}
    for milestones in arm["seeds"]:
        for result, _ in milestones:
            tasks = [result["tasks"][name] for name in names]
            mean = np.mean([task["metrics"][task["main"]] for task in tasks])
            values.setdefault(result["samples"], []).append(mean)
    warmup = result.get("warmup_samples") or 0
    points, fitted, means = [], [], []
    for samples in sorted(values):
        if len(values[samples]) == len(arm["seeds"]):
            points.append({"samples": samples, **seed_statistics(values[samples])})
            if samples > warmup:
                fitted.append(samples)
                means.append(points[-1]["mean"])
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
                final, reached = curve["points"][-1]["mean"], curve["samples_to_baseline"]
                lines.append([group, arm, f"{100 * final:.1f}", plots.fit_cell(curve["fit"]),
                              f"{reached:,.0f}" if reached else "not reached"])
    header = ["curve", "arm", "final, %", "fit", f"samples to final of {scaling['baseline']}"]
    near = ", ".join(scaling["near_chance"]) or "none"
    return f"{table(header, lines)}\n\nToo near chance: {near}.\n{scaling['caveat']}\n"


def read_arms(arguments):
    """Arguments NAME=FILE,FILE,... or FILE -> arms with their milestones, as for `scaling`."""
    arms = {}  # {name: {(seed, samples): (result, hits)}}
    for argument in arguments:
        name, equals, paths = argument.partition("=")
        if not equals or "/" in name:
            name, paths = "", argument
        for path in paths.split(","):
            result, hits = read_result(path)
            runs = arms.setdefault(name or result["run"], {})
            seed = path if result["seed"] is None else str(result["seed"])
            if (seed, result["samples"]) in runs:
                raise ValueError(f"{path}: a second result of seed {seed} with the same "
                                 "samples; two runs of one seed are two arms")
            runs[seed, result["samples"]] = result, hits
    found = []
    for name, runs in arms.items():
        seeds = {}
        for seed, samples in sorted(runs):  # so that arms are paired whatever the order given
            seeds.setdefault(seed, []).append(runs[seed, samples])
        found.append({"name": name, "seeds": list(seeds.values())})
    return found


def report(arms, rows, out):
    """Compare the newest results, draw the curves of milestones; write to out and print."""
    newest, trained, several = [], [], False
    for arm in arms:
        newest.append({"name": arm["name"], "runs": [seed[-1] for seed in arm["seeds"]]})
        several = several or any(len(seed) > 1 for seed in arm["seeds"])
        first, _ = arm["seeds"][0][0]
        if first["samples"] is not None:  # of foreign weights nobody tells
            trained.append(arm)
    comparison = compare(newest, rows)
    os.makedirs(out, exist_ok=True)
    write_json(f"{out}/comparison.json", comparison)
    write_text(f"{out}/comparison.md", markdown(comparison, rows))
    print(markdown(comparison, rows))
    if several:
        curves = scaling(trained)
        write_json(f"{out}/scaling.json", curves)
        write_text(f"{out}/scaling.md", scaling_markdown(curves))
        print(scaling_markdown(curves))
    try:
        if len(arms) > 1:
            plots.draw_comparison(comparison, f"{out}/comparison.png")
        if several:
            plots.draw_scaling(curves, f"{out}/scaling.png")
    except ImportError:
        print("no pictures: they need matplotlib (pip install matplotlib)")


def main(argv=None):
    config, arguments = load_config(Config, globals(), argv)
    if not arguments:
        raise ValueError("which results? Give NAME=FILE,FILE,... for each arm")
    arms = read_arms(arguments)
    first, _ = arms[0]["seeds"][0][0]
    report(arms, LISTS[first["list"]], config.out)


if __name__ == "__main__":
    run_main(main)
