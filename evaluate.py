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

from configs import load_config  # before torch: see there
import numpy as np
import PIL
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from data import benchmarks, results
from data.images import BadImage, decode, eval_image, normalise
from data.log import Progress, run_main
from data.look import Pool, draw_rows
from data.ranks import Ranks
from data.text import Tokenizer
from data.triplets import Triplets
from model import CLIP, SIZES, VisionTower, load_clip, load_vision, read_checkpoint


@dataclass
class Config:
    benchmarks: str = ""   # folder of sets wds_<name>_test (data.prepare.toy, data.prepare.benchmarks)
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


# ------------------------------------------------------------------------------ metrics
# Ties are broken as CLIP_benchmark breaks them, so that its figures come out: top-k by torch.topk,
# the per-class recall by argmax (lowest label first), the precision by a descending sort.


def class_vectors(prompts, rows):
    """Unit class vectors from unit prompt embeddings (P,E); rows (C,T): each class's prompts."""
    means = torch.stack([prompts[row].mean(0) for row in rows])  # (C,T) rows of (P,E) -> (C,E)
    return F.normalize(means, dim=-1)


def top_k_hits(logits, labels, ks):
    """{k: (n,) bool, whether the label is among the k largest of its row} for logits (n,C)."""
    order = logits.topk(max(ks), dim=1).indices  # (n,C) -> (n,k)
    right = order == labels[:, None]
    return {k: right[:, :k].any(1) for k in ks}


def mean_per_class_recall(right, labels):
    """Mean, over the classes present, of the share of right (n,) among the class's samples."""
    counts = np.bincount(labels)
    return float((np.bincount(labels, weights=right)[counts > 0] / counts[counts > 0]).mean())


def average_precision(scores, truth):
    """Mean of the precision at each positive; scores (n,), truth (n,) bool; 0 without positives."""
    truth = truth[scores.sort(descending=True, stable=True).indices].double()
    precision = truth.cumsum(0) / torch.arange(1, len(truth) + 1)
    return float((precision * truth).sum() / truth.sum().clamp(min=1))


def recall_hits(queries, gallery, query_image, gallery_image, ks=(1, 5, 10)):
    """{k: (q,) bool, whether something of the query's image is among its k nearest}.

    queries (q,E), gallery (g,E); *_image: index of the image that each belongs to.
    """
    hits = {k: [] for k in ks}
    for start in range(0, len(queries), 1024):  # 1024 x 25,010 scores are 100 MB
        scores = queries[start:start + 1024] @ gallery.T  # (b,E) x (E,g) -> (b,g)
        own = query_image[start:start + 1024, None]
        for k in ks:
            nearest = gallery_image[scores.topk(min(k, len(gallery)), dim=1).indices]  # (b,k)
            hits[k].append((nearest == own).any(1))
    return {k: torch.cat(parts) for k, parts in hits.items()}


def classify(images, classes, labels):
    """Metrics and per-sample hits of images (n,E) against class vectors (C,E)."""
    ks = (1, 5) if len(classes) >= 5 else (1,)  # below 5 classes top-5 means nothing
    top, best = {k: [] for k in ks}, []
    labels = torch.as_tensor(labels)
    for start in range(0, len(images), 1024):
        logits = 100.0 * images[start:start + 1024] @ classes.T  # (b,E) x (E,C) -> (b,C)
        part = labels[start:start + 1024]
        for k, right in top_k_hits(logits, part, ks).items():
            top[k].append(right)
        best.append(logits.argmax(1) == part)
    hits = {f"acc{k}": torch.cat(top[k]).numpy() for k in ks}
    hits["mean_per_class_recall"] = torch.cat(best).numpy()
    metrics = {"acc1": float(hits["acc1"].mean()),
               "acc5": float(hits["acc5"].mean()) if "acc5" in hits else None}
    metrics["mean_per_class_recall"] = mean_per_class_recall(hits["mean_per_class_recall"],
                                                             labels.numpy())
    return metrics, {**hits, "labels": labels.numpy()}


def rank_labels(images, classes, truth):
    """Mean average precision of images (n,E) against class vectors (C,E); truth (n,C) of 0, 1."""
    logits = 100.0 * images @ classes.T  # (n,E) x (E,C) -> (n,C)
    truth = torch.as_tensor(truth).bool()
    precision = [average_precision(logits[:, c], truth[:, c]) for c in range(len(classes))]
    return {"mean_average_precision": float(np.mean(precision))}, {}


def retrieve(images, captions, image_of):
    """Recalls both ways; images (n,E), captions (m,E), image_of (m,): each caption's image."""
    own, image_of = torch.arange(len(images)), torch.as_tensor(image_of)
    hits = {}
    for name, found in (("image", recall_hits(captions, images, image_of, own)),
                        ("text", recall_hits(images, captions, own, image_of))):
        hits.update({f"{name}_retrieval_recall@{k}": right.numpy() for k, right in found.items()})
    metrics = {name: float(right.mean()) for name, right in hits.items()}
    metrics["mean_recall@1"] = (metrics["image_retrieval_recall@1"]
                                + metrics["text_retrieval_recall@1"]) / 2
    return metrics, {**hits, "image_of": image_of.numpy()}


def two_afc(ref, left, right, labels):
    """Score of each triplet: 1 if the chosen side is nearer, 0.5 for a tie, 0 otherwise.

    ref, left, right: (n,E) unit embeddings; labels (n,), 1 = right chosen. Returns (n,) float32.
    The nearer side has the larger cosine, compared in float32: bfloat16 makes false ties.
    """
    ref, left, right = ref.float(), left.float(), right.float()
    lead = (ref * right).sum(-1) - (ref * left).sum(-1)                                  # (n,)
    chosen = 2 * labels.to(lead) - 1                                                     # (n,) +-1
    return 0.5 + 0.5 * torch.sign(chosen * lead)


class Pixels(Dataset):
    """Preprocessed images for `embed`; an error travels as text: workers garble exceptions.

    benchmark: anything with a length and image(i) -> Pillow RGB.  size: S.
    """

    def __init__(self, benchmark, size):
        self.benchmark, self.size = benchmark, size

    def __len__(self):
        return len(self.benchmark)

    def __getitems__(self, indices):
        try:
            return torch.stack([eval_image(self.benchmark.image(i), self.size) for i in indices])
        except ValueError as error:
            return str(error)


def embed(encode, items, device, batch_size, workers=0, dtype="float32", ranks=None, label=""):
    """Embeddings of all images, in order, on the CPU, the same on every rank: (n,E) float32.

    items: Dataset whose __getitems__(list of indices) gives uint8 (b,3,S,S), or an error's text.
    Whole batches are dealt to the ranks (data.ranks.Ranks; None: alone): a batch meets the same
    arithmetic at any world size, and no sample is padded, dropped or counted twice.
    label: what the progress line calls it, "" for no such line.
    """
    batches = _dealt([range(i, min(i + batch_size, len(items)))
                      for i in range(0, len(items), batch_size)], ranks)
    loader = DataLoader(items, batch_sampler=batches, num_workers=workers, collate_fn=_as_is,
                        pin_memory=device.type == "cuda")
    parts, error, progress = [], None, _progress(label, batches, "images", ranks)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16"):
        for pixels in loader:  # within one autocast, which converts the weights once
            if isinstance(pixels, str):
                error = pixels
                break
            parts.append(encode(normalise(pixels.to(device, non_blocking=True))).float().cpu())
            if progress:
                progress.add(len(pixels))
    return torch.cat(_exchange(parts, error, ranks))


def embed_texts(clip, tokenizer, texts, cache, device, batch_size=1024, dtype="float32",
                ranks=None, label=""):
    """Unit embeddings of texts (list of str) as (len(texts),E) float32 on the CPU.

    cache: dict text -> (E,), read and extended, so that a run encodes each distinct text once.
    New texts run in the order of their length: encode_text cuts each batch to its longest.
    """
    new = sorted(set(texts) - cache.keys(), key=lambda text: (len(text), text))
    batches = [new[i:i + batch_size] for i in range(0, len(new), batch_size)]
    own = _dealt(batches, ranks)
    parts, progress = [], _progress(label, own, "texts", ranks)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16"):
        for batch in own:
            tokens = tokenizer(batch, clip.config.context_length)  # (b,L) int64
            parts.append(clip.encode_text(tokens).float().cpu())
            if progress:
                progress.add(len(batch))
    for batch, part in zip(batches, _exchange(parts, None, ranks)):
        cache.update(zip(batch, part))
    return torch.stack([cache[text] for text in texts])  # (len(texts),E)


def _dealt(batches, ranks):
    """The batches of this rank: one in `world`."""
    return batches[ranks.rank::ranks.world] if ranks else batches


def _progress(label, batches, unit, ranks):
    """Rank 0's progress line; it counts its own batches, the others keep its pace."""
    shown = label and (ranks is None or ranks.rank == 0)
    return Progress(label, sum(map(len, batches)), unit) if shown else None


def _exchange(parts, error, ranks):
    """All ranks' batches in their order; an error of any rank is raised on every rank."""
    everyone = ranks.collect((parts, error)) if ranks else [(parts, error)]
    for _, message in everyone:
        if message is not None:
            raise ValueError(message)
    world, total = len(everyone), sum(len(part) for part, _ in everyone)
    return [everyone[i % world][0][i // world] for i in range(total)]


def _as_is(batch):
    return batch


def evaluate_set(clip, tokenizer, folder, batch_size=256, workers=0, dtype="float32", prompts=None,
                 ranks=None, label=""):
    """Zero-shot metrics of one CLIP on one set, in one pass over its images.

    clip: encode_image (b,3,S,S) -> (b,E) unit, encode_text (b,L) -> (b,E) unit, .config and
    .logit_scale, whose device is used.  folder: path or BenchmarkSet.  prompts: embed_texts' cache,
    to share between sets.  ranks: a Ranks that ALL its processes call this with, or None: alone.
    Returns a dict: metrics {name: value in 0..1, acc5 None below 5 classes}, main (the metric for
    family means), family, type, n, classes, templates, captions, partial (unlike its row),
    classnames_sha256, templates_sha256, samples_sha256, seconds, and hits {metric: (n,) or (m,)}.
    """
    benchmark = folder if isinstance(folder, benchmarks.BenchmarkSet) else benchmarks.BenchmarkSet(folder)
    device, start = clip.logit_scale.device, time.time()
    how = {"device": device, "dtype": dtype, "ranks": ranks, "label": label}
    texts = benchmark.captions or [prompt for row in benchmark.prompts() for prompt in row]
    cache = {} if prompts is None else prompts
    text_embeddings = embed_texts(clip, tokenizer, texts, cache, **how)  # (m,E) or (C*T,E)
    images = embed(clip.encode_image, Pixels(benchmark, clip.config.image_size),
                   batch_size=batch_size, workers=workers, **how)  # (n,E)
    if benchmark.type == "retrieval":
        metrics, hits = retrieve(images, text_embeddings, benchmark.labels)
    else:
        shape = len(benchmark.classnames), len(benchmark.templates)
        classes = class_vectors(text_embeddings, torch.arange(len(texts)).view(shape))
        measure = classify if benchmark.type == "classification" else rank_labels
        metrics, hits = measure(images, classes, benchmark.labels)
    row = benchmarks.ROW_OF.get(benchmark.name)
    return {"metrics": metrics, "main": row.main if row else benchmarks.MAIN[benchmark.type],
            "family": row.family if row else benchmark.family, "type": benchmark.type,
            "n": len(benchmark), "classes": len(benchmark.classnames),
            "templates": len(benchmark.templates), "captions": len(benchmark.captions),
            "partial": bool(benchmarks.unlike_row(benchmark)),
            **benchmark.fingerprints, "seconds": round(time.time() - start, 2), "hits": hits}


class _TripletPixels(Dataset):
    """Triplets as items of `embed`: an index is a triplet, that is three images."""

    def __init__(self, triplets, size):
        self.triplets, self.size = triplets, size

    def __len__(self):
        return len(self.triplets)

    def __getitems__(self, rows):
        try:
            return self.triplets.load(self.size, rows).flatten(0, 1)  # (b,3,3,S,S) -> (3b,3,S,S)
        except ValueError as error:
            return str(error)


def evaluate_triplets(encode, triplets, size, device, batch_size=256, workers=0, dtype="float32",
                      ranks=None, label=""):
    """2AFC of an image tower on triplets: {"nights": task} as evaluate_set has it.

    encode: (b,3,S,S) -> (b,E) unit.  Where the file tells ImageNet's triplets apart, also
    "nights-imagenet" and "nights-no-imagenet".  Ties count half.
    """
    start = time.time()
    embeddings = embed(encode, _TripletPixels(triplets, size), device, max(1, batch_size // 3),
                       workers, dtype, ranks, label).unflatten(0, (-1, 3))  # (3n,E) -> (n,3,E)
    scores = two_afc(*embeddings.unbind(1), torch.from_numpy(triplets.labels)).numpy()  # (n,)
    parts = {"nights": np.ones(len(scores), bool)}
    if triplets.is_imagenet is not None:
        parts |= {"nights-imagenet": triplets.is_imagenet,
                  "nights-no-imagenet": ~triplets.is_imagenet}
    return {name: {"metrics": {"2afc": float(scores[part].mean(dtype=float))}, "main": "2afc",
                   "family": "nights", "part_of": None if name == "nights" else "nights",
                   "type": "2afc", "n": int(part.sum()), "classes": 2, "templates": 0,
                   "captions": 0, "samples_sha256": triplets.fingerprint,
                   "seconds": round(time.time() - start, 2), "hits": {"2afc": scores[part]}}
            for name, part in parts.items() if part.any()}


@torch.no_grad()
def embed_triplets(encode, triplets, size, device, batch_size=256):
    """Unit float32 embeddings of a split: ref, left, right, each (n,E) on the host.

    encode: (b,3,S,S) normalised -> (b,E), of any length; S = size. Of batch_size triplets at once.
    """
    found = []
    for start in range(0, len(triplets), batch_size):
        rows = np.arange(start, min(start + batch_size, len(triplets)))      # (b,)
        pixels = triplets.load(size, rows).to(device).flatten(0, 1)          # (3b,3,S,S)
        embeddings = F.normalize(encode(normalise(pixels)).float(), dim=-1)
        found.append(embeddings.cpu().unflatten(0, (-1, 3)))                 # (b,3,E)
    return torch.cat(found).unbind(1)


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
                         "(python -m data.prepare.vocabulary clip makes it)")
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
            tasks = evaluate_triplets(
                model.encode, found, model.vision.config.image_size, device, config.batch_size,
                config.workers, config.dtype, ranks, label)
        else:
            tasks = {key: evaluate_set(
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
            text = text_rows(model, [config.query], device)[0]  # (E,)
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
        rows.append((f"{name}: captions", text_rows(model, pool.captions, device) @ query))
    return rows


def embed_pool(model, pool, device):
    """Unit embeddings (n,E) of the pool's images."""
    items = Pixels(pool, model.vision.config.image_size)
    return embed(model.encode, items, device, batch_size=64)


def text_rows(model, texts, device):
    """Unit embeddings (len(texts),E); ValueError for a model without text."""
    if model.tokenizer is None:
        raise ValueError(f"{model.about['checkpoint']}: has no text side (stage 1), or brings no "
                         "vocabulary; use --image=FILE, or give --vocabulary=FILE")
    return embed_texts(model.clip, model.tokenizer, texts, {}, device)


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
