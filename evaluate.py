"""Evaluates checkpoints: zero-shot classification, retrieval, human judgements; compares them.

    python evaluate.py out/toy/ckpt.pt out/toy_pi/ckpt.pt --benchmarks=data/toy/benchmarks \\
        --nights=data/toy/nights --out=out/eval          # differences are to the first
    python evaluate.py out/toy out/toy_pi ...            # folders: all milestones, and curves
    python evaluate.py out/toy_pi/ckpt.pt --query="a red circle" --images=data/toy/pairs
    python evaluate.py out/toy_pi/ckpt.pt --image=FILE --labels="a red circle,a blue star"
    torchrun --nproc_per_node=8 evaluate.py ...          # the same numbers, sooner

A checkpoint is a file of this project (stage 1: 2AFC and probe), of OpenAI, open_clip or Hugging
Face, random:SIZE for fresh weights, or a run's folder; NAME=checkpoint names its result. Writes
to --out: <run>.json with <run>.npz (per-sample hits), comparison.json and .md; for folders
scaling.*; with --images query.png. A finished set is evaluated again only if the
checkpoint, the set or the precision changed. Several seeds of an arm: python -m data.results.

The protocol is CLIP_benchmark's. Letters: n samples, C classes, T prompts a class, m captions,
E embedding, b of a batch, S pixels."""
import os
import time
from dataclasses import dataclass, replace

from configs import check_ranges, load_config  # before torch: see there
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from data.images import Pixels, normalise
from data.log import Progress, run_main
from data.ranks import Ranks
from data.text import Tokenizer
from model import CLIP, SIZES, VisionTower, load, read_checkpoint

# -------------------------------------------------------------------------- metrics
# Embeddings are unit rows in float32 on the CPU. Ties are broken as CLIP_benchmark breaks them:
# top-k by topk, per-class recall by argmax (the lowest label), precision by a descending sort.


def class_vectors(prompts, rows):
    """Unit class vectors (C,E) from unit prompts (P,E); rows (C,T): each class's prompts."""
    return F.normalize(prompts[rows].mean(1), dim=-1)               # (C,T,E) -> (C,E)


def classify(images, classes, labels):
    """Metrics and per-sample hits of images (n,E) against class vectors (C,E); labels (n,)."""
    labels = torch.as_tensor(labels)
    logits = 100.0 * images @ classes.T                             # (n,C), 200 MB for ImageNet
    ks = (1, 5) if len(classes) >= 5 else (1,)  # below 5 classes top-5 means nothing
    nearest = logits.topk(max(ks), dim=1).indices                   # (n,k)
    hits, metrics = {}, {"acc1": None, "acc5": None}
    for k in ks:
        hits[f"acc{k}"] = (nearest[:, :k] == labels[:, None]).any(1).numpy()
        metrics[f"acc{k}"] = float(hits[f"acc{k}"].mean())
    right = (logits.argmax(1) == labels).numpy()                    # (n,)
    hits |= {"mean_per_class_recall": right, "labels": labels.numpy()}
    metrics["mean_per_class_recall"] = mean_per_class_recall(right, labels.numpy())
    return metrics, hits


def mean_per_class_recall(right, labels):
    """Mean, over the classes present, of the share of right (n,) among the class's samples."""
    samples = np.bincount(labels)                                   # (C,)
    found = np.bincount(labels, weights=right)                      # (C,)
    present = samples > 0
    return float((found[present] / samples[present]).mean())


def rank_labels(images, classes, truth):
    """Mean average precision of images (n,E) against classes (C,E); truth (n,C) of 0, 1."""
    logits = 100.0 * images @ classes.T                             # (n,C)
    truth = torch.as_tensor(truth).bool()
    precision = [average_precision(logits[:, c], truth[:, c]) for c in range(len(classes))]
    return {"mean_average_precision": float(np.mean(precision))}, {}


def average_precision(scores, truth):
    """Mean of the precision at each positive, 0 without any; scores (n,), truth (n,) bool."""
    truth = truth[scores.sort(descending=True, stable=True).indices].double()
    precision = truth.cumsum(0) / torch.arange(1, len(truth) + 1)   # (n,)
    return float((precision * truth).sum() / truth.sum().clamp(min=1))


def retrieve(images, captions, image_of):
    """Recalls both ways; images (n,E), captions (m,E), image_of (m,): each caption's image.

    A caption is a hit if its image is among its k nearest, an image if any of its captions is.
    """
    image_of = torch.as_tensor(image_of)
    scores = captions @ images.T                                    # (m,n), 500 MB for COCO
    hits = {}
    for k in (1, 5, 10):
        found = scores.topk(min(k, len(images)), dim=1).indices     # (m,k) images
        hits[f"image_retrieval_recall@{k}"] = (found == image_of[:, None]).any(1).numpy()
    for k in (1, 5, 10):
        found = scores.T.topk(min(k, len(captions)), dim=1).indices  # (n,k) captions
        own = image_of[found] == torch.arange(len(images))[:, None]
        hits[f"text_retrieval_recall@{k}"] = own.any(1).numpy()
    metrics = {name: float(right.mean()) for name, right in hits.items()}
    metrics["mean_recall@1"] = (metrics["image_retrieval_recall@1"]
                                + metrics["text_retrieval_recall@1"]) / 2
    return metrics, hits | {"image_of": image_of.numpy()}


def two_afc(ref, left, right, labels):
    """Score of each triplet: 1 if the chosen side is nearer, 0.5 for a tie, 0 otherwise.

    ref, left, right: (n,E) unit rows; labels (n,), 1 = right chosen. Returns (n,) float32.
    The nearer side has the larger cosine, compared in float32: bfloat16 makes false ties.
    """
    ref, left, right = ref.float(), left.float(), right.float()
    lead = (ref * right).sum(-1) - (ref * left).sum(-1)             # (n,), of the right side
    chosen = 2 * labels.to(lead) - 1                                # (n,) +-1
    return 0.5 + 0.5 * torch.sign(chosen * lead)


def knn_probe(images, labels, k=20, temperature=0.07):
    """Hits (n,) of the k-nearest-neighbour probe of images (n,E), labels (n,); leave one out.

    The k most similar other images vote for their classes, each with the weight
    exp(cosine / temperature) (arXiv 1805.01978, with the values of DINO, arXiv 2104.14294).
    """
    labels = torch.as_tensor(labels)
    right = []
    for start in range(0, len(images), 1024):
        similar = images[start:start + 1024] @ images.T             # (b,n)
        rows = torch.arange(len(similar))                           # (b,)
        similar[rows, start + rows] = -torch.inf                    # nobody votes for itself
        cosines, nearest = similar.topk(min(k, len(images) - 1), dim=1)  # (b,k)
        votes = torch.zeros(len(rows), int(labels.max()) + 1)       # (b,C)
        votes.scatter_add_(1, labels[nearest], (cosines / temperature).exp())
        right.append(votes.argmax(1) == labels[start + rows])
    return torch.cat(right).numpy()


# -------------------------------------------------------------------------- embedding passes
# Whole batches are dealt to the ranks: a batch meets the same arithmetic at any world size, and
# no sample is padded, dropped or counted twice.


def embed(encode, items, device, batch_size, workers=0, dtype="float32", ranks=None, label=""):
    """Embeddings of all images, in order, on the CPU, the same on every rank: (n,E) float32.

    items: has a length; __getitems__(indices) gives uint8 (b,3,S,S); data.images.Pixels.
    ranks: a Ranks that all its processes call this with; None: alone.
    label: what the progress line calls it; "": no such line.
    """
    device = torch.device(device)
    own = deal(range(len(items)), batch_size, ranks)
    loader = DataLoader(items, batch_sampler=own, num_workers=workers,
                        pin_memory=device.type == "cuda",
                        collate_fn=torch.as_tensor,   # the items' batch as it is
                        generator=torch.Generator())  # else it draws from a trainer's
    batches = (normalise(pixels.to(device, non_blocking=True)) for pixels in loader)
    return torch.cat(run_batches(encode, batches, own, device, dtype, ranks, label, "images"))


def embed_texts(clip, tokenizer, texts, cache, device, batch_size=1024, dtype="float32",
                ranks=None, label=""):
    """Unit embeddings of texts (list of str) as (len(texts),E) float32 on the CPU.

    cache: dict text -> (E,), read and extended, so that a run encodes each distinct text once;
    in the order of their length, as a batch is laid out to its longest.
    """
    device = torch.device(device)
    new = sorted(set(texts) - cache.keys(), key=lambda text: (len(text), text))
    own = deal(new, batch_size, ranks)
    batches = (tokenizer(batch, clip.config.context_length) for batch in own)  # (b,L) int64
    parts = run_batches(clip.encode_text, batches, own, device, dtype, ranks, label, "texts")
    for batch, rows in zip(deal(new, batch_size, None), parts):
        cache.update(zip(batch, rows))
    return torch.stack([cache[text] for text in texts])             # (len(texts),E)


def deal(items, batch_size, ranks):
    """This rank's batches of a list or range: one in `world`."""
    batches = [items[i:i + batch_size] for i in range(0, len(items), batch_size)]
    return batches[ranks.rank::ranks.world] if ranks else batches


def run_batches(encode, batches, own, device, dtype, ranks, label, unit):
    """[encode(batch) (b,E), ...] of all ranks, in order; an error of one is raised on each.

    batches: iterable of this rank's inputs; own: what `deal` gave it, as the inputs' lengths.
    """
    progress = Progress(label, sum(map(len, own)), unit)
    parts, error = [], None
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16"):
            for batch in batches:  # within one autocast, which converts the weights once
                parts.append(encode(batch).float().cpu())           # (b,E)
                if label:
                    progress.add(len(own[len(parts) - 1]))
    except ValueError as failure:  # from a worker it comes with its traceback
        error = str(failure).strip().splitlines()[-1].removeprefix("ValueError: ")
    everyone = ranks.collect((parts, error)) if ranks else [(parts, error)]
    for parts, message in everyone:
        if message is not None:
            raise ValueError(message)
        if not all(rows.isfinite().all() for rows in parts):
            raise ValueError(f"{label or 'these weights'}: embeddings are not finite (NaN)")
    count = sum(len(parts) for parts, _ in everyone)
    world = len(everyone)
    return [everyone[i % world][0][i // world] for i in range(count)]


def embed_triplets(encode, triplets, size, device, batch_size=256, **how):
    """Unit embeddings of a split: ref, left, right, each (n,E) float32 on the CPU.

    encode: (b,3,S,S) normalised -> (b,E), of any length; S = size. Each distinct image is
    embedded once.  how: workers, dtype, ranks and label, as `embed` has them.
    """
    rows = embed(encode, triplets.pixels(size), device, batch_size, **how)  # (m,E)
    rows = F.normalize(rows, dim=-1)
    return rows[torch.from_numpy(triplets.index)].unbind(1)         # (n,3,E) -> (n,E) each


# -------------------------------------------------------------------------- one set


def evaluate_set(clip, tokenizer, benchmark, batch_size=256, workers=0, prompts=None, **how):
    """Zero-shot metrics of one CLIP on one set, in one pass over its images.

    clip: model.CLIP, on its own device.  benchmark: data.benchmarks.BenchmarkSet.  prompts:
    embed_texts' cache, to share between sets.  how: dtype, ranks and label, as `embed` has them.
    Returns {name: task}, of classification {name-knn: task} as well. A task is a dict: metrics
    {name: value in 0..1, acc5 None below 5 classes}, what BenchmarkSet.about() says of the set,
    seconds, and hits {metric: (n,) or (m,)}.
    """
    start = time.time()
    device = clip.logit_scale.device
    texts = benchmark.captions if benchmark.type == "retrieval" else benchmark.prompts()
    cache = {} if prompts is None else prompts
    text_rows = embed_texts(clip, tokenizer, texts, cache, device, **how)  # (m,E) or (C*T,E)
    pixels = Pixels(benchmark, clip.config.image_size)
    images = embed(clip.encode_image, pixels, device, batch_size, workers, **how)  # (n,E)
    if benchmark.type == "retrieval":
        metrics, hits = retrieve(images, text_rows, benchmark.labels)
    else:
        rows = torch.arange(len(texts)).view(len(benchmark.classnames), -1)  # (C,T)
        classes = class_vectors(text_rows, rows)                    # (C,E)
        measure = classify if benchmark.type == "classification" else rank_labels
        metrics, hits = measure(images, classes, benchmark.labels)
    tasks = {benchmark.name: {"metrics": metrics, **benchmark.about(),
                              "seconds": round(time.time() - start, 2), "hits": hits}}
    if benchmark.type == "classification":
        tasks |= evaluate_probe(images, benchmark)
    return tasks


def evaluate_probe(images, benchmark):
    """The k-NN probe of unit images (n,E) of a set: {name-knn: a dict as evaluate_set has it}."""
    start = time.time()
    right = knn_probe(images, benchmark.labels)
    return {f"{benchmark.name}-knn": {
        "metrics": {"knn": float(right.mean())}, **benchmark.about(), "main": "knn",
        "family": "k-NN probe", "type": "probe", "templates": 0,
        "seconds": round(time.time() - start, 2), "hits": {"knn": right}}}


def evaluate_triplets(encode, triplets, size, device, batch_size=256, name="nights", **how):
    """2AFC of an image tower on judgements: {name: a dict as evaluate_set returns it}.

    Arguments as embed_triplets has them. Where the file tells ImageNet's triplets apart, also
    NAME-imagenet and NAME-no-imagenet. Ties count half.
    """
    from data import judgements
    start = time.time()
    sides = embed_triplets(encode, triplets, size, device, batch_size, **how)
    scores = two_afc(*sides, torch.from_numpy(triplets.labels)).numpy()  # (n,)
    tasks = {}
    for part, chosen in judgements.parts(triplets, name).items():    # (n,) bool
        hits = scores[chosen]
        tasks[part] = {"metrics": {"2afc": float(hits.mean(dtype=float))},
                       **judgements.about(triplets, name, part, len(hits)),
                       "seconds": round(time.time() - start, 2), "hits": {"2afc": hits}}
    return tasks


# -------------------------------------------------------------------------- the script


@dataclass
class Config:
    benchmarks: str = ""   # folder of sets wds_<name>_test (data.prepare.benchmarks, or toy)
    judgements: str = ""   # NIGHTS' folder, a CSV, or a folder of such: 2AFC of each test split
    nights: str = ""       # one of them, whose row is called nights
    min_votes: int = 6     # unanimous judgements that a triplet needs, where votes are known
    out: str = "out/eval"  # where results go, and are found again
    list: str = "code"     # the paper's rows: "code", as its group ran them, or "plan", later
    partial: bool = False  # take rows with other than their published sizes; recorded
    batch_size: int = 256  # images at a time
    workers: int = 2       # processes that decode images; 0: this one
    dtype: str = "float32"         # or "bfloat16": faster, other decimals; recorded
    vocabulary: str = ""           # .tiktoken file for weights that bring none, as foreign ones
    quick_gelu: bool | None = None  # activation of foreign weights; None: as their format tells
    seed: int = 0          # of random:SIZE
    images: str = ""       # a folder of pairs to look at with --query or --image
    query: str = ""        # a text: its nearest images
    image: str = ""        # an image file: its nearest images, and captions
    labels: str = ""       # texts with commas between: which of them the image shows
    pool: int = 2000       # so many of the folder's images are searched

    def check(self):
        check_ranges(self, positive=("batch_size", "pool"), not_negative=("workers", "min_votes"),
                     dtype=("float32", "bfloat16"), list=("code", "plan"))
        if self.query and not self.images:
            raise ValueError(f"query={self.query}: needs --images=FOLDER, pairs to search")
        if bool(self.images or self.labels) != bool(self.query or self.image):
            raise ValueError("--image or --query: needs --images or --labels, and they need it")
        if self.labels and not self.image:
            raise ValueError(f"labels={self.labels}: goes with --image=FILE")


@dataclass
class Model:
    """A checkpoint made ready. No clip: stage 1, and random:SIZE without a vocabulary."""
    path: str
    info: dict  # as model.load has it
    vision: VisionTower
    clip: CLIP | None
    tokenizer: Tokenizer | None
    device: torch.device

    def embed_images(self, pictures, batch_size=64, **how):
        """Unit embeddings (n,E) of anything with a length and image(i) -> Pillow RGB."""
        items = Pixels(pictures, self.vision.config.image_size)
        return F.normalize(embed(self.vision, items, self.device, batch_size, **how), dim=-1)

    def embed_texts(self, texts):
        """Unit embeddings (len(texts),E); only with a tokenizer."""
        return embed_texts(self.clip, self.tokenizer, texts, {}, self.device)


def open_model(path, config, device):
    """Read one checkpoint, or draw it; refuses a vocabulary that does not fit."""
    random = path.startswith("random:")
    module = draw_weights(path, config) if random else load(path, config.quick_gelu)
    module.to(device).eval()
    vision, clip, tokenizer = module, None, None
    if isinstance(module, CLIP):
        vision, clip = module.vision, module
        vocabulary = clip.vocabulary or config.vocabulary
        tokenizer = Tokenizer(vocabulary) if vocabulary else None
    if tokenizer and tokenizer.size != clip.config.vocab_size:
        raise ValueError(f"{path}: has {clip.config.vocab_size} tokens, the vocabulary "
                         f"{tokenizer.size}; give its own by --vocabulary=FILE")
    return Model(path, module.info, vision, clip, tokenizer, device)


def draw_weights(path, config):
    """random:SIZE -> a CLIP, or without a vocabulary for its text a VisionTower."""
    torch.manual_seed(config.seed)
    name = path.removeprefix("random:")
    if name not in SIZES:
        raise ValueError(f"{path}: no such size; known are {', '.join(SIZES)}")
    size = SIZES[name]
    if config.vocabulary:
        module = CLIP(replace(size, vocab_size=Tokenizer(config.vocabulary).size))
    else:
        module = VisionTower(size)
    module.info = {"sha256": f"{path}:{config.seed}", "format": "random", "step": 0,
                   "samples": 0, "config": {}}
    return module


def jobs_for(model, jobs):
    """Those that a model can do: a tower without text has judgements and probes."""
    path, without_text = model.path, {}
    for name, job in jobs.items():
        if job.type == "2afc":
            without_text[name] = job
        if job.type == "classification":
            without_text[f"{name}-knn"] = job
    if model.clip is None and not without_text:
        raise ValueError(f"{path}: is a vision tower only; give --judgements")
    if model.clip and not model.tokenizer and any(job.type != "2afc" for job in jobs.values()):
        raise ValueError(f"{path}: brings no vocabulary; give --vocabulary=data/clip.tiktoken")
    return jobs if model.clip else without_text


def evaluate_checkpoint(name, path, jobs, config, ranks, device):
    """Evaluate what its result file lacks, and write set by set; returns (result, hits)."""
    from data import benchmarks, results
    start, prompts = time.time(), {}
    model = open_model(path, config, device)
    jobs = jobs_for(model, jobs)
    result, hits = results.begin_result(name, model, config)
    rows = benchmarks.LISTS[config.list]
    done = ranks.collect(results.finished(result, jobs))[0]  # as rank 0 has it
    for key, job in jobs.items():
        if key in done:
            continue
        label = f"{name}: {key}"
        how = {"batch_size": config.batch_size, "workers": config.workers,
               "dtype": config.dtype, "ranks": ranks, "label": label if ranks.rank == 0 else ""}
        if job.type == "2afc":
            size = model.vision.config.image_size
            tasks = evaluate_triplets(model.vision, job, size, device, name=key, **how)
        elif model.clip:
            tasks = evaluate_set(model.clip, model.tokenizer, job, prompts=prompts, **how)
        else:
            tasks = evaluate_probe(model.embed_images(job, **how), job)
        for task_name, task in tasks.items():
            hits[task_name] = task.pop("hits")
            result["tasks"][task_name] = task
        if ranks.rank == 0:
            results.keep_result(config.out, result, hits, rows)
            print(results.describe(name, tasks), flush=True)
    if ranks.rank == 0:
        results.keep_result(config.out, result, hits, rows)
        print(f"{name}: {len(jobs)} sets, {len(done)} from before, {time.time() - start:.1f} s")
    return result, hits


def main(argv=None):
    config, arguments = load_config(Config, globals(), argv)

    # ---- everything named on the command line; complaints come before any work
    if not arguments:
        raise ValueError("which checkpoints? For example: python evaluate.py out/toy/ckpt.pt "
                         "--benchmarks=data/toy/benchmarks (--help says more)")
    from data import benchmarks, results  # here and below: trainers do not import them with us
    runs = results.read_arguments(arguments, read_checkpoint)
    paths = {}  # result's name: checkpoint
    for checkpoints in runs.values():
        paths |= checkpoints
    jobs = {}  # task's name: BenchmarkSet or data.triplets.Triplets
    if config.benchmarks:
        jobs |= benchmarks.open_sets(config.benchmarks, config.partial)
    if config.nights or config.judgements:
        from data.judgements import open_judgements
        judged = open_judgements(config.judgements, config.min_votes, config.nights)
        for name in judged.keys() & jobs.keys():
            raise ValueError(f"{judged[name].file}: {name} is the name of another set; rename it")
        jobs |= judged
    if not (jobs or config.images or config.labels):
        raise ValueError("nothing to do; give --benchmarks, --judgements, --images or --labels")
    os.makedirs(config.out, exist_ok=True)
    ranks = Ranks()
    device = ranks.start()

    # ---- look
    if (config.images or config.labels) and ranks.rank == 0:
        from data import look
        look.look(paths, lambda path: open_model(path, config, device), config)

    # ---- evaluate and compare
    if jobs:
        found = {}
        for name, path in paths.items():
            found[name] = evaluate_checkpoint(name, path, jobs, config, ranks, device)
        if ranks.rank == 0:
            arms = []
            for name, checkpoints in runs.items():
                arms.append({"name": name, "seeds": [[found[key] for key in checkpoints]]})
            results.report(arms, benchmarks.LISTS[config.list], config.out)


if __name__ == "__main__":
    run_main(main)
