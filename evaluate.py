"""Evaluates checkpoints: zero-shot classification, retrieval, human judgements; compares runs.

    python evaluate.py out/toy/ckpt.pt out/toy_pi/ckpt.pt --benchmarks=data/toy/benchmarks \\
        --nights=data/toy/nights --out=out/eval          # differences are to the first
    python evaluate.py ViT-B-32.pt --vocabulary=data/clip.tiktoken --benchmarks=data/benchmarks
    python evaluate.py base=out/b0/ckpt.pt,out/b1/ckpt.pt pi=out/p0/ckpt.pt,out/p1/ckpt.pt ...
    python evaluate.py out/toy out/toy_pi ...            # folders: all milestones, scaling curves
    python evaluate.py out/toy_pi/ckpt.pt --query="a red circle" --images=data/toy/pairs
    torchrun --nproc_per_node=8 evaluate.py ...          # the same numbers, sooner

What can stand where a checkpoint stands: a file of this project (stage 1: 2AFC only), of OpenAI,
open_clip or Hugging Face; a run's folder; random:SIZE for fresh weights; the .json of an earlier
evaluation; and NAME=A,B,... for an arm with several seeds.

Writes to --out: <run>.json with <run>.npz (per-sample hits), comparison.json, comparison.md, for
folders scaling.json and scaling.png, for --query and --image query.png. A finished set is not
evaluated again unless the checkpoint, the set or the precision changed.
"""
import dataclasses
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

from configs import load_config, run_main  # before torch, see there
import numpy as np
import PIL
import torch
import torch.nn.functional as F

from data import benchmarks, results
from data.images import BadImage, decode, eval_image, normalise
from data.neighbours import Pool, draw_rows
from data.ranks import Ranks
from data.text import Tokenizer
from data.triplets import Triplets
from model import CLIP, SIZES, VisionTower, load_clip, load_vision, read_checkpoint


@dataclass
class Config:
    benchmarks: str = ""   # folder of sets wds_<name>_test (data.toy, data.prepare_benchmarks)
    nights: str = ""       # NIGHTS' folder or a CSV of judgements; its test split gives 2AFC
    out: str = "out/eval"  # where results go, and are found again
    list: str = "code"     # the paper's rows: "code" as its group ran them, or "plan", a later one
    partial: bool = False  # take rows with other than their published sizes; recorded
    batch_size: int = 256  # images at a time
    workers: int = 2       # processes that decode images; 0: this one
    dtype: str = "float32"         # or "bfloat16": faster, other decimals; recorded
    vocabulary: str = ""           # .tiktoken file for weights that bring none (all foreign ones)
    quick_gelu: bool | None = None  # activation of foreign weights; None: as their format tells
    seed: int = 0          # of random:SIZE
    images: str = ""       # a folder of pairs to look at with --query or --image
    query: str = ""        # a text: its nearest images
    image: str = ""        # an image file: its nearest images, and captions
    pool: int = 2000       # so many of the folder's images are searched

    def check(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype}: must be float32 or bfloat16")
        if self.list not in benchmarks.LISTS:
            raise ValueError(f"list={self.list}: must be {' or '.join(benchmarks.LISTS)}")
        for field, least in (("batch_size", 1), ("workers", 0), ("pool", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least {least}")
        if bool(self.images) != bool(self.query or self.image):
            raise ValueError(f"images={self.images}: goes with --query=TEXT or --image=FILE")


# ------------------------------------------------------------------------------ what to evaluate


def read_arguments(arguments):
    """Positionals -> arms [{"name", "seeds": [[path, ...] by samples, ...]}], {path: run name}."""
    arms = []
    for argument in arguments:
        name, equals, paths = argument.partition("=")
        if not equals or os.path.exists(argument):
            name, paths = "", argument
        arms.append({"name": name, "seeds": [milestones(path) for path in paths.split(",")]})
    paths = [path for arm in arms for seed in arm["seeds"] for path in seed]
    names = run_names(paths)
    for arm in arms:
        arm["name"] = arm["name"] or names[arm["seeds"][0][-1]]
    if len({arm["name"] for arm in arms}) < len(arms):
        raise ValueError(f"two arms are called {', '.join(sorted(a['name'] for a in arms))}")
    return arms, names


def milestones(path):
    """A run's folder -> its checkpoints in order of samples; anything else stands for itself."""
    if path.startswith("random:"):
        if path.removeprefix("random:") not in SIZES:
            raise ValueError(f"{path}: no such size; known are {', '.join(SIZES)}")
        return [path]
    path = os.path.normpath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    last = os.path.join(path, "ckpt.pt")
    if not os.path.isfile(last):
        return [path]  # a file, or a folder as Hugging Face has them
    end = read_checkpoint(last)["samples"]
    found = {int(match[1]): str(file) for file in Path(path).glob("samples_*.pt")
             if (match := re.fullmatch(r"samples_(\d+)\.pt", file.name))}
    found[end] = last  # the newest is often a milestone as well
    return [found[samples] for samples in sorted(found)]


def run_names(paths):
    """{path: name of its result}: the run's folder, with as many parents as tell them apart."""
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"{twice}: given twice")
    for depth in range(20):
        names = {path: run_name(path, depth) for path in paths}
        if len({*names.values(), "comparison", "scaling"}) == len(paths) + 2:  # our other files
            return names
    raise ValueError(f"{', '.join(paths)}: no distinct names for these; rename a folder")


def run_name(path, depth):
    """out/toy/ckpt.pt -> toy; samples_000000064000.pt -> toy@64000; ViT-B-32.pt -> ViT-B-32."""
    if path.startswith("random:"):
        return path.replace(":", "-")
    file = Path(os.path.abspath(path))
    parents, samples = [parent.name for parent in file.parents if parent.name], file.stem[8:]
    if file.name == "ckpt.pt":
        name, parents = parents[0], parents[1:]
    elif file.name == "best.pt":  # of stage 1
        name, parents = f"{parents[0]}-best", parents[1:]
    elif file.name.startswith("samples_") and samples.isdecimal():
        name, parents = f"{parents[0]}@{int(samples)}", parents[1:]
    else:
        name = file.stem
    return "-".join([*reversed(parents[:depth]), name])


def find_benchmarks(config):
    """{set name: BenchmarkSet}, all indexed and checked against their rows before a model runs."""
    folders = benchmarks.find_sets(config.benchmarks) if config.benchmarks else {}
    sets = {name: benchmarks.BenchmarkSet(folder) for name, folder in folders.items()}
    for found in sets.values():
        if (difference := benchmarks.unlike_row(found)) and not config.partial:
            raise ValueError(f"{difference}; complete it, or accept it by --partial=true")
    return sets


# ------------------------------------------------------------------------------ models


@dataclass
class Model:
    """A checkpoint made ready. Stage 1 (and random:SIZE without a vocabulary): no clip, no text."""
    vision: VisionTower
    clip: CLIP | None
    tokenizer: Tokenizer | None
    about: dict  # what the result file says of it

    def encode(self, images):
        """(b,3,S,S) normalised -> (b,E) fp32 of unit length."""
        return F.normalize(self.vision(images).float(), dim=-1)


def open_model(path, config, device):
    """Read the weights of one path of `read_arguments`; refuses a vocabulary that does not fit."""
    about = {"checkpoint": path, "step": None, "samples": None, "seed": None, "warmup_samples": 0}
    clip, kind = None, None
    if path.startswith("random:"):
        vision, clip = draw_weights(path.removeprefix("random:"), config)
        info = {"sha256": f"{path}:{config.seed}", "format": "random", "step": 0, "samples": 0}
    else:
        kind = settings_of(path, about)
        if kind == "vision":
            vision = load_vision(path, device)
        else:
            clip = load_clip(path, device, config.quick_gelu)
            vision = clip.vision
        info = (clip or vision).info
    about.update({key: info[key] for key in ("sha256", "step", "samples")})
    about.update(kind="clip" if clip else "vision", source=info["format"], device=str(device),
                 precision=config.dtype, quick_gelu=vision.config.quick_gelu)
    return Model(vision.to(device).eval(), clip and clip.to(device).eval(),
                 clip and open_vocabulary(path, clip, config), about)


def settings_of(path, about):
    """Kind of a checkpoint of this project; notes its seed and warm-up. None for a foreign file."""
    try:
        content = read_checkpoint(path)
    except (ValueError, FileNotFoundError):  # load_clip knows the foreign formats and folders
        return None
    settings = content["config"]
    about["seed"] = settings.get("seed")
    about["warmup_samples"] = settings.get("warmup_steps", 0) * settings.get("batch_size", 0)
    return content["kind"]


def draw_weights(size, config):
    """Fresh weights of a size: (vision tower, CLIP, or None without a vocabulary for its text)."""
    torch.manual_seed(config.seed)
    if not config.vocabulary:
        return VisionTower(SIZES[size]), None
    clip = CLIP(dataclasses.replace(SIZES[size], vocab_size=Tokenizer(config.vocabulary).size))
    return clip.vision, clip


def open_vocabulary(path, clip, config):
    """The checkpoint's own vocabulary, or --vocabulary; None where there is neither."""
    if not (clip.vocabulary or config.vocabulary):
        return None
    tokenizer = Tokenizer(clip.vocabulary or config.vocabulary)
    if tokenizer.size != clip.config.vocab_size:
        raise ValueError(f"{path}: has {clip.config.vocab_size} tokens, the vocabulary "
                         f"{tokenizer.size}; give its own by --vocabulary=FILE")
    return tokenizer


# ------------------------------------------------------------------------------ one checkpoint


def evaluate_checkpoint(name, path, sets, triplets, config, ranks, device):
    """Evaluate what is not in its result file yet; returns (result, hits). Writes set by set."""
    if path.endswith(".json"):
        return results.read_result(path)
    target, model = os.path.join(config.out, name), open_model(path, config, device)
    if sets and model.clip and not model.tokenizer:
        raise ValueError(f"{path}: brings no vocabulary; give --vocabulary=data/clip.tiktoken "
                         "(python -m data.prepare_vocabulary clip makes it)")
    if not (model.clip or triplets):
        raise ValueError(f"{path}: is a vision tower only; give --nights")
    result, hits = begin_result(name, target, model, config)
    prompts, start = {}, time.time()
    jobs = (sets if model.clip else {}) | ({"nights": triplets} if triplets else {})
    done = ranks.collect([key for key, found in jobs.items()
                          if fits(result["tasks"].get(key), found)])[0]  # as rank 0 has it
    for key in [key for key in jobs if key not in done]:
        label, found = f"{name}: {key}", jobs[key]
        if key == "nights":
            tasks = benchmarks.evaluate_triplets(
                model.encode, found, model.vision.config.image_size, device, config.batch_size,
                config.workers, config.dtype, ranks, label)
        else:
            tasks = {key: benchmarks.evaluate_set(
                model.clip, model.tokenizer, found, config.batch_size, config.workers,
                config.dtype, prompts, ranks, label)}
        for task_name, task in tasks.items():
            hits[task_name] = task.pop("hits")
            result["tasks"][task_name] = task
        if ranks.rank == 0:
            write_result(target, result, hits, config)
            print(describe(label, result["tasks"][key]), flush=True)
    if ranks.rank == 0:
        write_result(target, result, hits, config)
        print(f"{name}: {len(jobs)} sets, {len(done)} of them from before, "
              f"{time.time() - start:.1f} s", flush=True)
    return result, hits


def write_result(target, result, hits, config):
    """Write what there is so far, with the rows of the list that are still missing."""
    result["missing"] = [row.sets[0] for row in benchmarks.LISTS[config.list]
                         if row.sets[0] not in result["tasks"]]
    results.write_result(target, result, hits)


def begin_result(name, target, model, config):
    """The run's earlier result if it is of the same weights and precision, else an empty one."""
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__, "pillow": PIL.__version__}
    result = {"format": results.FORMAT, "run": name, **model.about, "versions": versions,
              "list": config.list, "missing": [], "tasks": {}}
    if os.path.exists(f"{target}.json"):
        earlier, hits = results.read_result(target)
        if all(earlier[key] == result[key] for key in ("sha256", "precision", "quick_gelu")):
            return {**result, "tasks": earlier["tasks"]}, hits
    return result, {}


def fits(task, found):
    """Whether an earlier task was measured on the set (or triplets) as it is now."""
    now = ({"samples_sha256": found.fingerprint} if isinstance(found, Triplets)
           else found.fingerprints)
    return task is not None and all(task[key] == value for key, value in now.items())


def describe(label, task):
    """One line of a finished set: every metric in %."""
    figures = [f"{metric} {100 * value:.1f}" for metric, value in task["metrics"].items()
               if value is not None]
    return f"{label}: {'  '.join(figures)}  (n {task['n']:,}, {task['seconds']:.1f} s)"


# ------------------------------------------------------------------------------ looking


def look(names, config, device):
    """Draw what each checkpoint finds nearest to --query or --image: <out>/query.png."""
    if config.image and not os.path.isfile(config.image):
        raise FileNotFoundError(f"image={config.image}: no such file")
    pool, rows, asked = Pool(config.images, config.pool), [], None
    if config.image:
        try:
            asked = decode(Path(config.image).read_bytes())
        except BadImage as error:
            raise ValueError(f"image={config.image}: {error}") from None
    for path, name in names.items():
        model = open_model(path, config, device)
        if config.query:
            text = embed_texts(model, [config.query], device)[0]  # (E,)
            rows.append((f"{name}: images", embed_pool(model, pool, device) @ text))
        if config.image:
            rows += nearest_to_image(name, model, asked, pool, device)
    target = os.path.join(config.out, "query.png")
    draw_rows(config.query or config.image, asked, rows, pool).save(target)
    print(f"nearest to {config.query or config.image}: {target}")


def nearest_to_image(name, model, asked, pool, device):
    """[(label, similarities (n,))]: of the pool's images and, with a text side, its captions."""
    pixels = normalise(eval_image(asked, model.vision.config.image_size)[None])  # (1,3,S,S)
    with torch.no_grad():
        query = model.encode(pixels.to(device))[0].cpu()  # (E,)
    rows = [(f"{name}: images", embed_pool(model, pool, device) @ query)]
    if model.tokenizer:
        rows.append((f"{name}: captions", embed_texts(model, pool.captions, device) @ query))
    return rows


def embed_pool(model, pool, device):
    """Unit embeddings (n,E) of the pool's images."""
    items = benchmarks.Pixels(pool, model.vision.config.image_size)
    return benchmarks.embed(model.encode, items, device, batch_size=64)


def embed_texts(model, texts, device):
    """Unit embeddings (len(texts),E); ValueError for a model without text."""
    if model.tokenizer is None:
        raise ValueError(f"{model.about['checkpoint']}: has no text side (stage 1), or brings no "
                         "vocabulary; use --image=FILE, or give --vocabulary=FILE")
    return benchmarks.embed_texts(model.clip, model.tokenizer, texts, {}, device)


# ------------------------------------------------------------------------------ main


def main(argv=None):
    config, arguments = load_config(Config, globals(), argv)
    rows = benchmarks.LISTS[config.list]

    # ---- everything named on the command line; complaints come before any work
    if not arguments:
        raise ValueError("which checkpoints? For example: python evaluate.py out/toy/ckpt.pt "
                         "--benchmarks=data/toy/benchmarks (--help says more)")
    arms, names = read_arguments(arguments)
    sets = find_benchmarks(config)
    triplets = Triplets(config.nights, "test") if config.nights else None
    fresh = [path for path in names if not path.endswith(".json")]
    if fresh and not (sets or triplets or config.images):
        raise ValueError("nothing to do; give --benchmarks, --nights or --images")
    os.makedirs(config.out, exist_ok=True)
    ranks = Ranks()
    device = ranks.start()

    # ---- look
    if config.images and ranks.rank == 0:
        look({path: names[path] for path in fresh}, config, device)

    # ---- evaluate
    if sets or triplets or not fresh:
        found = {path: evaluate_checkpoint(name, path, sets, triplets, config, ranks, device)
                 for path, name in names.items()}
        if ranks.rank == 0:
            report(arms, found, rows, config)


def report(arms, found, rows, config):
    """Write and print the comparison of the newest checkpoints, and the curves of milestones."""
    last = [{"name": arm["name"], "runs": [found[seed[-1]] for seed in arm["seeds"]]}
            for arm in arms]
    comparison = results.compare(last, rows)
    results.write_json(os.path.join(config.out, "comparison.json"), comparison)
    text = results.markdown(comparison, rows)
    results.write_text(os.path.join(config.out, "comparison.md"), text)
    print("\n" + text)
    if config.benchmarks and not comparison["list"]:
        print(f"None of the {len(rows)} sets of the paper's list is in {config.benchmarks}.")
    if any(len(seed) > 1 for arm in arms for seed in arm["seeds"]):
        curves = results.scaling([{"name": arm["name"], "seeds": [
            [found[path] for path in seed] for seed in arm["seeds"]]} for arm in arms])
        results.write_json(os.path.join(config.out, "scaling.json"), curves)
        print(results.scaling_markdown(curves))
        try:
            results.draw_scaling(curves, os.path.join(config.out, "scaling.png"))
        except ImportError:
            print("no scaling.png: it needs matplotlib (pip install matplotlib)")


if __name__ == "__main__":
    run_main(main)
