"""pretrain.py: gradients across ranks and micro-batches, schedule, resume, and what goes wrong."""
import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import pretrain
from configs import load_config
from data import ranks as ranks_module
from data.images import Augmentation
from data.pairs import split_rows
from data.pieces import ChunkedLoss
from data.ranks import Ranks
from model import CLIP, SIZES, load_clip, read_checkpoint

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = dataclasses.replace(SIZES["toy"], image_size=16, embed_dim=16, vision_width=16, text_width=16,
                           vision_layers=2, text_layers=2, vision_heads=2, text_heads=2,
                           context_length=8, vocab_size=40)
BATCH = 12


# ------------------------------------------------------------------ gradients: ranks, micro-batches


def tiny(dtype=torch.float64):
    """A two-block CLIP, 12 images (12, 3, 16, 16) and captions (12, 8) of uneven length."""
    # A fresh CLIP's embeddings all point one way (mean cosine 0.9), and the gradient is a difference
    # of near equals: fp32 keeps 0.4 to 1.7 millionths of it, by seed. This seed keeps the digits.
    torch.manual_seed(2)
    clip = CLIP(TINY).to(dtype)
    images = torch.randn(BATCH, 3, 16, 16, dtype=dtype)
    tokens = torch.zeros(BATCH, 8, dtype=torch.int64)
    for row, length in enumerate(torch.randint(1, 6, (BATCH,)).tolist()):
        tokens[row, :length + 2] = torch.tensor([38, *torch.randint(1, 38, (length,)), 39])
    return clip, images, tokens


def written_out_gradient(dtype):
    """The formula of the CLIP paper's figure 3 on all 12 pairs at once, by plain autograd."""
    clip, images, tokens = tiny(dtype)
    image_emb, text_emb, scale = clip(images, tokens)
    logits = scale * image_emb @ text_emb.T
    labels = torch.arange(BATCH)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    return {name: p.grad for name, p in clip.named_parameters()}, loss.item()


def our_gradient(parts, chunk, dtype, group=None, compiled=False):
    """The loop's gradient of this rank's share in `parts` micro-batches; group: of alone.py."""
    clip, images, tokens = tiny(dtype)
    if compiled:  # traced and differentiated as by inductor, without its minutes of C++
        clip.vision.compile(backend="aot_eager")
        clip.text.compile(backend="aot_eager")
    ranks = Ranks()
    local = BATCH // ranks.world
    mine = slice(ranks.rank * local, (ranks.rank + 1) * local)
    batch = {"views": images[mine], "tokens": tokens[mine], "samples": torch.arange(local)}
    config = pretrain.Config(loss_chunk=chunk, dtype="float32")
    model = pretrain.Encoder(clip, config)
    if ranks.world > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    loss_of = functools.partial(pretrain.global_loss, config=config, ranks=ranks)
    if group:
        load_config(pretrain.Config, vars(pretrain), [str(ROOT / "configs/ideas/alone.py")])
        config = types.SimpleNamespace(loss_chunk=chunk, dtype="float32", group=group)
        loss_of = functools.partial(pretrain.global_loss, config=config, ranks=ranks)
    if parts == 1:
        loss, _ = pretrain.whole_gradient(model, batch, config, ranks)
    else:
        micro = split_rows(batch, math.ceil(local / parts))
        loss, _ = pretrain.cached_gradient(model, micro, loss_of, ranks)
    load_config(pretrain.Config, vars(pretrain), [])  # alone.py's function goes again
    if ranks.world > 1:
        dist.all_reduce(loss)
    return {n: p.grad.clone() for n, p in clip.named_parameters()}, loss.item() / ranks.world


GatherRows = ranks_module.GatherRows


class GatherWithoutGradient(torch.autograd.Function):
    """What people get wrong: the rows of other ranks are constants."""
    @staticmethod
    def forward(ctx, rows):
        ctx.rank, ctx.count = dist.get_rank(), len(rows)
        return GatherRows.forward(ctx, rows)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.rank * ctx.count:(ctx.rank + 1) * ctx.count]


CASES = [(parts, chunk, dtype) for parts in (1, 2, 3) for chunk in (0, 2)
         for dtype in (torch.float64, torch.float32)]


def rank_process(rank, world, folder):
    """One rank computes every case; rank 0 leaves the gradients in `folder`."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=world)
    results = {case: our_gradient(*case) for case in CASES}
    if world == 2:
        results["compiled"] = our_gradient(2, 0, torch.float64, compiled=True)
    results["alone"] = our_gradient(1, 0, torch.float64, group=2)
    ranks_module.GatherRows = GatherWithoutGradient
    results["no gradient"] = our_gradient(1, 0, torch.float64)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """of_ranks(world) -> {case: (gradients, loss)}, computed once in `world` processes."""
    known = {}

    def results(world):
        if world not in known:
            folder = tmp_path_factory.mktemp("ranks")
            torch.multiprocessing.spawn(rank_process, (world, folder), nprocs=world)
            known[world] = torch.load(folder / "results.pt")
        return known[world]
    return results


def largest_relative_difference(ours, reference):
    """Of any single parameter, relative to that parameter's own gradient."""
    return max(((ours[n] - reference[n]).norm() / reference[n].norm()).item() for n in reference)


def relative_difference(ours, reference):
    """Of all parameters as one vector."""
    ours, reference = (torch.cat([g[n].flatten() for n in reference]) for g in (ours, reference))
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("parts, chunk, dtype", CASES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradient_is_the_one_pass_gradient(of_ranks, world, parts, chunk, dtype):
    case = (parts, chunk, dtype)
    ours, loss = our_gradient(*case) if world == 1 else of_ranks(world)[case]
    reference, reference_loss = written_out_gradient(dtype)
    if dtype == torch.float64:
        assert largest_relative_difference(ours, reference) < 1e-12
    else:  # a small tensor's gradient alone can round at 1.3e-6 of its norm; fp64 covers each
        assert relative_difference(ours, reference) < 1e-6
        assert ours["logit_scale"].item() == pytest.approx(reference["logit_scale"].item(), rel=1e-6)
    assert loss == pytest.approx(reference_loss, rel=1e-12 if dtype == torch.float64 else 1e-6)


def test_compiled_towers_under_ddp_give_the_same_gradient(of_ranks):
    ours, _ = of_ranks(2)["compiled"]
    assert largest_relative_difference(ours, written_out_gradient(torch.float64)[0]) < 1e-12


@pytest.mark.parametrize("mistake", ["no gradient", "alone"])
@pytest.mark.parametrize("world", [2, 4])
def test_the_common_mistakes_give_another_gradient(of_ranks, world, mistake):
    ours, _ = of_ranks(world)[mistake]
    assert largest_relative_difference(ours, written_out_gradient(torch.float64)[0]) > 1e-2


def test_groups_that_do_not_see_each_other_weigh_by_their_pairs():
    """alone.py with 4, 4 and 2 pairs a group: each pair weighs a tenth, by logarithms written out."""
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(10, 4, dtype=torch.float64), dim=1) for _ in range(2))
    expected = 0.0
    for first, last in ((0, 4), (4, 8), (8, 10)):
        scores = (3 * images[first:last] @ texts[first:last].T).exp()
        for own in range(last - first):
            for others in (scores[own], scores[:, own]):
                expected -= (scores[own, own] / others.sum()).log() / 2 / 10
    load_config(pretrain.Config, vars(pretrain), [str(ROOT / "configs/ideas/alone.py")])
    rows = {"image": images, "text": texts, "scale": torch.tensor(3.0)}
    settings = types.SimpleNamespace(group=4, loss_chunk=0)
    loss = pretrain.global_loss(rows, settings, Ranks())
    load_config(pretrain.Config, vars(pretrain), [])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_chunked_loss_equals_the_plain_one():
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(9, 4, dtype=torch.float64), dim=1) for _ in range(2))
    plain = pretrain.contrastive_loss(a, b, a, b, 10.0, 0)
    for chunk in (1, 4, 9):
        loss = ChunkedLoss.apply(pretrain.contrastive_loss, chunk, a, b, a, b, torch.tensor(10.0), 0)
        assert loss.item() == pytest.approx(plain.item(), rel=1e-14)


def test_the_gradient_of_a_chunked_loss_has_the_weight_of_the_loss():
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(9, 4, dtype=torch.float64), dim=1) for _ in range(2))
    found = []
    for chunk in (None, 4):
        image, scale = a.clone().requires_grad_(), torch.tensor(10.0, requires_grad=True)
        inputs = image, b, image, b, scale, 0
        if chunk:
            loss = ChunkedLoss.apply(pretrain.contrastive_loss, chunk, *inputs)
        else:
            loss = pretrain.contrastive_loss(*inputs)
        (3 * loss).backward()
        found.append((image.grad, scale.grad))
    torch.testing.assert_close(found[0], found[1])


def test_loss_of_random_features_is_log_batch():
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(256, 64), dim=1) for _ in range(2))
    loss = pretrain.contrastive_loss(a, b, a, b, 1.0, 0)
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


# -------------------------------------------------------------------------------- the schedule


def rates(**settings):
    config = pretrain.Config(**settings)
    return [pretrain.lr_at(step, 100, config) for step in range(100)]


def test_cosine_starts_peaks_and_ends_where_it_should():
    lr = rates(lr=1.0, min_lr=0.1, warmup_steps=10)
    assert lr[0] == 0.1 and lr[9] == 1.0 == max(lr) and lr[99] == pytest.approx(0.1)
    assert lr[54] == pytest.approx((1.0 + 0.1) / 2)  # half of the 90 steps after warm-up


def test_constant_decay_stays_at_the_peak():
    assert rates(lr=1.0, decay="constant", warmup_steps=10)[9:] == [1.0] * 91


def recipe(*argv):
    """Config of recipes and settings; the functions that they replace are put back."""
    config, _ = load_config(pretrain.Config, vars(pretrain), [str(arg) for arg in argv])
    load_config(pretrain.Config, vars(pretrain), [])
    return config


def test_yfcc_has_the_papers_augmentation():
    config = recipe(ROOT / "configs/yfcc.py", "--compile=False")
    assert (config.crop, config.flip, config.jitter, config.jitter_p, config.grey_p, config.blur_p
            ) == ((0.2, 1.0), 0.5, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5)


@pytest.mark.parametrize("model, epochs, lr, warmup", [
    ("ViT-B-32", 32, 5e-4, 2500), ("ViT-B-16", 64, 5e-4, 2500), ("ViT-L-14", 32, 5e-4, 10_000),
    ("ViT-H-14", 64, 2e-4, 2500)])
def test_yfcc_has_the_papers_schedule_for_each_size(model, epochs, lr, warmup):
    config = recipe(ROOT / "configs/yfcc.py", f"--model={model}", "--compile=False")
    assert (config.epochs, config.lr, config.warmup_steps, config.batch_size) == (
        epochs, lr, warmup, 18_432)


# ------------------------------------------------------------------------ whole runs, small


FAST = ["--model=toy", "--image_size=32", "--context_length=32", "--batch_size=16", "--workers=0",
        "--warmup_steps=2", "--lr=1e-3", "--dtype=float32", "--compile=False", "--log_every=1",
        "--save_every=2", "--max_steps=12", "--crop=(0.6,1.0)"]


@pytest.fixture(scope="module")
def arguments(toy_world):
    """arguments(out_dir, *more) of a twelve-step run on the small toy world, ready in 1 s."""
    def build(out_dir, *more):
        return [f"--data={toy_world}/pairs", f"--vocabulary={toy_world}/vocabulary/toy.tiktoken",
                f"--out_dir={out_dir}", *FAST, *more]
    return build


def here(argv):
    """pretrain.main in this process, leaving no signal handler behind."""
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        pretrain.main(argv)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def process(argv, *, code=None, world=1):
    """Start `world` ranks of pretrain.py, or of `code` with the arguments; returns the Popens."""
    port = free_port()
    command = [sys.executable, "-c", code] if code else [sys.executable, "pretrain.py"]
    started = []
    for rank in range(world):
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                            "PYTHONFAULTHANDLER": "1", "GLOO_SOCKET_IFNAME": "lo"}
        if world > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started.append(subprocess.Popen([*command, *argv], cwd=ROOT, env=env, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    return started


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def finish(started, limit=120):
    """Exit codes and outputs; a rank that waits for a dead one is killed like torchrun would.

    Ranks that end by themselves end up to a second apart on a busy machine: they get 10.
    """
    deadline, patience = time.time() + limit, None
    while any(p.poll() is None for p in started) and time.time() < deadline:
        if any(p.poll() not in (None, 0) for p in started):
            patience = patience or time.time() + 10
            [p.kill() for p in started if p.poll() is None and time.time() > patience]
        time.sleep(0.05)
    hanging = [p.poll() is None for p in started]
    [p.send_signal(signal.SIGABRT) for p in started if p.poll() is None]  # shows where it waits
    outputs = [p.communicate()[0] for p in started]
    assert not any(hanging), "\n".join(["a rank hangs", *outputs])
    return [p.returncode for p in started], outputs


def trace(out_dir):
    """What must not depend on when a run was interrupted: every logged figure but the clock's."""
    keys = ("step", "samples", "loss", "lr", "scale", "grad_norm", "accuracy")
    with open(f"{out_dir}/log.jsonl") as file:
        return [tuple(record.get(key) for key in keys) for record in map(json.loads, file)]


KILL = '''
import io, os, signal, sys, torch, model, pretrain
point, at = sys.argv.pop(1), int(sys.argv.pop(1))
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def half(content, file):
    whole = io.BytesIO(); torch_save(content, whole)
    file.write(whole.getvalue()[:len(whole.getvalue()) // 2]); file.flush(); die()
def renamed(*args):
    replace(*args); die()
torch_save, replace, save = torch.save, os.replace, pretrain.save
def save_and_die(names, config, content):
    if content["step"] == at:
        if point == "opened": torch.save = die
        if point == "half": torch.save = half
        if point == "written": os.fsync = die
        if point == "synced": os.replace = die
        if point == "renamed": os.replace = renamed
    return save(names, config, content)
pretrain.save = save_and_die
lr_at = pretrain.lr_at
def lr_or_die(step, total_steps, config):
    return die() if point == "step" and step == at else lr_at(step, total_steps, config)
pretrain.lr_at = lr_or_die
if point == "worker":
    fetch = pretrain.Pairs.__getitems__
    pretrain.Pairs.__getitems__ = lambda self, items: die() if items[0][1] == 16 * at \\
        else fetch(self, items)
pretrain.run_main(lambda: pretrain.main(sys.argv[1:]))
'''


def test_run_killed_again_and_again_equals_one_never_interrupted(arguments, tmp_path):
    """Five points inside a save, two steps between saves, and a loader process; two loaders."""
    here(arguments(tmp_path / "whole"))
    for point, at in [("opened", 2), ("half", 2), ("step", 3), ("written", 4), ("synced", 6),
                      ("renamed", 8), ("step", 9), ("worker", 10)]:
        workers = "--workers=2" if point in ("worker", "renamed") else "--workers=0"
        codes, outputs = finish(process([point, str(at), *arguments(tmp_path / "cut", workers)],
                                        code=KILL))
        assert codes[0] != 0, (point, outputs)
        if (tmp_path / "cut/ckpt.pt").exists():
            assert read_checkpoint(tmp_path / "cut/ckpt.pt")["step"] <= at
    here(arguments(tmp_path / "cut"))
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "cut").glob("*.pt*")} <= {"ckpt.pt", "ckpt.pt.tmp"}


@pytest.mark.parametrize("micro", [16, 6])
def test_two_loaders_and_a_resume_change_no_digit(arguments, tmp_path, micro):
    here(arguments(tmp_path / "whole", f"--micro_batch={micro}"))
    finish(process(["step", "7", *arguments(tmp_path / "cut", f"--micro_batch={micro}",
                                            "--workers=2")], code=KILL))
    here(arguments(tmp_path / "cut", f"--micro_batch={micro}"))
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")


def test_two_ranks_killed_and_resumed_equal_two_never_interrupted(arguments, tmp_path):
    codes, outputs = finish(process(arguments(tmp_path / "whole"), world=2))
    assert codes == [0, 0], outputs
    finish(process(["synced", "6", *arguments(tmp_path / "cut")], code=KILL, world=2))
    codes, outputs = finish(process(arguments(tmp_path / "cut"), world=2))
    assert codes == [0, 0], outputs
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")


def test_one_then_two_then_one_rank_see_the_same_samples_and_losses(arguments, tmp_path):
    here(arguments(tmp_path / "alone"))
    finish(process(["step", "4", *arguments(tmp_path / "mixed")], code=KILL))
    finish(process(["step", "8", *arguments(tmp_path / "mixed")], code=KILL, world=2))
    here(arguments(tmp_path / "mixed"))
    alone, mixed = trace(tmp_path / "alone"), trace(tmp_path / "mixed")
    assert [r[:2] for r in mixed] == [r[:2] for r in alone]
    assert [r[2] for r in mixed] == pytest.approx([r[2] for r in alone], rel=1e-5)


def test_torchrun_trains_on_two_cpu_ranks(arguments, tmp_path):
    """The README's command; names in the file carry no trace of the wrapper."""
    torchrun = pathlib.Path(sys.executable).parent / "torchrun"
    done = subprocess.run([torchrun, "--nproc_per_node=2", f"--master_port={free_port()}",
                           "pretrain.py", *arguments(tmp_path, "--max_steps=2")], timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                          cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    names = read_checkpoint(tmp_path / "ckpt.pt")["weights"]
    assert not [name for name in names if "module" in name or "_orig_mod" in name]


GROUP = '''
import atexit, sys, weakref, pretrain, torch.distributed as dist
join, groups = dist.init_process_group, []
def watched(backend):
    join(backend)
    groups.append(weakref.ref(dist.group.WORLD))
dist.init_process_group = watched
atexit.register(lambda: print("group after the run:", *(group() for group in groups)))
pretrain.run_main(lambda: pretrain.main(sys.argv[1:]))
'''


@pytest.mark.parametrize("bad_share, code", [(0, 0), (0.3, 2)])
def test_nothing_keeps_the_group_beyond_the_run(arguments, tmp_path, bad_share, code):
    """gloo's threads live as long as it; met by Python's exit they could abort an ended run."""
    shards_with_bad_images(tmp_path / "pairs", bad_share)
    codes, outputs = finish(process(
        arguments(tmp_path / "run", f"--data={tmp_path}/pairs", "--batch_size=400", "--max_steps=3",
                  "--save_every=100"), code=GROUP, world=2))
    assert codes == [code, code], outputs
    assert all("group after the run: None" in output for output in outputs), outputs


def test_same_seed_twice_gives_the_same_log(arguments, tmp_path):
    here(arguments(tmp_path / "a"))
    here(arguments(tmp_path / "b"))
    assert trace(tmp_path / "a") == trace(tmp_path / "b")


def test_sigterm_finishes_the_step_saves_and_exits_0(arguments, tmp_path):
    running = process(arguments(tmp_path, "--max_steps=100000", "--save_every=100000"))
    deadline = time.time() + 60
    while not (tmp_path / "log.jsonl").exists() or len(trace(tmp_path)) < 3:
        assert time.time() < deadline and running[0].poll() is None
        time.sleep(0.05)
    running[0].terminate()
    codes, outputs = finish(running)
    assert codes == [0], outputs
    assert read_checkpoint(tmp_path / "ckpt.pt")["step"] == trace(tmp_path)[-1][0] >= 3


def test_full_disk_warns_keeps_the_last_checkpoint_and_goes_on(arguments, tmp_path, monkeypatch,
                                                               capsys):
    import resource
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = pretrain.save

    def save_on_a_small_disk(names, config, content):
        if content["step"] == 4:  # a file may have 100 kB from now on
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        save(names, config, content)

    monkeypatch.setattr(pretrain, "save", save_on_a_small_disk)
    try:
        here(arguments(tmp_path, "--max_steps=6"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "not written" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "ckpt.pt")["step"] == 2
    assert trace(tmp_path)[-1][0] == 6 and not list(tmp_path.glob("*.tmp"))


def test_milestones_are_kept(arguments, tmp_path):
    here(arguments(tmp_path, "--keep_at=(32,100)"))
    names = {path.name for path in tmp_path.glob("*.pt")}
    assert names == {"ckpt.pt", "samples_000000000032.pt", "samples_000000000112.pt"}
    assert read_checkpoint(tmp_path / "samples_000000000112.pt")["optimizer"] is None


@pytest.mark.parametrize("change, words", [
    (["--lr=0.5"], "lr was 0.001 in the checkpoint, is 0.5 now"),
    (["--batch_size=8"], "batch_size was 16 in the checkpoint, is 8 now"),
    (["--seed=43"], "seed was 42 in the checkpoint, is 43 now"),
])
def test_resume_with_another_config_is_refused(arguments, tmp_path, change, words):
    here(arguments(tmp_path, "--max_steps=2"))
    with pytest.raises(ValueError, match=words):
        here(arguments(tmp_path, "--max_steps=2", *change))


def test_resume_on_other_data_is_refused(arguments, tmp_path, toy_world):
    here(arguments(tmp_path, "--max_steps=2"))
    with pytest.raises(ValueError, match="pairs was .* in the checkpoint"):
        here(arguments(tmp_path, "--max_steps=2", f"--data={toy_world}/pairs/held_out"))


@pytest.mark.parametrize("setting, message", [
    ("--jitter=0.4,0.4,0.4", "jitter=.*: must be 4 numbers"),
    ("--crop=0.9,", "crop=.*: must be 2 numbers"), ("--crop=90,100", "crop=.*: two shares"),
    ("--crop=1.0,0.5", "the smaller one first"), ("--flip=30", "flip=30.0: is a share"),
    ("--seed=-1", "seed=-1: must be 0 or more")])
def test_settings_that_cannot_be_meant_are_refused_before_any_work(arguments, tmp_path, setting,
                                                                   message):
    with pytest.raises(ValueError, match=message):
        here(arguments(tmp_path / "run", setting))
    assert not (tmp_path / "run").exists()


def test_a_missing_folder_of_sets_is_said_before_the_first_step(arguments, tmp_path):
    with pytest.raises(FileNotFoundError, match="benchmarks=.*none: no such folder"):
        here(arguments(tmp_path / "run", f"--benchmarks={tmp_path}/none"))
    assert not (tmp_path / "run").exists()


def test_a_clip_of_another_vocabulary_is_no_start(arguments, toy_world, tmp_path):
    here(arguments(tmp_path / "run", "--max_steps=1"))
    lines = (toy_world / "vocabulary/toy.tiktoken").read_text().splitlines()
    words = [line.split()[0] for line in lines]
    words[600], words[601] = words[601], words[600]              # two words change their ids
    other = "".join(f"{word} {rank}\n" for rank, word in enumerate(words))
    (tmp_path / "other.tiktoken").write_text(other)
    with pytest.raises(ValueError, match="ckpt.pt: its vocabulary is not this run's"):
        here(arguments(tmp_path / "next", f"--init={tmp_path}/run/ckpt.pt",
                       f"--vocabulary={tmp_path}/other.tiktoken"))


@pytest.mark.parametrize("change", [{"kind": "vision", "vocabulary": None}, {"optimizer": None}],
                         ids=["stage 1", "milestone"])
def test_what_no_run_can_go_on_from_is_refused_in_one_line(arguments, tmp_path, change):
    from model import write_checkpoint
    here(arguments(tmp_path, "--max_steps=2"))
    write_checkpoint(tmp_path / "ckpt.pt", read_checkpoint(tmp_path / "ckpt.pt") | change)
    with pytest.raises(ValueError, match="ckpt.pt: a tower of stage 1, or a milestone"):
        here(arguments(tmp_path, "--max_steps=2"))



def test_resume_false_insists_on_an_empty_folder(arguments, tmp_path):
    here(arguments(tmp_path, "--max_steps=2"))
    with pytest.raises(ValueError, match="resume=False"):
        here(arguments(tmp_path, "--resume=False"))


def test_sixteen_chosen_pairs_are_learnt_by_heart(arguments, tmp_path):
    recipe = tmp_path / "sixteen.py"
    recipe.write_text("def choose_pairs(shards, config):\n    return range(100, 116)\n")
    here([str(recipe), *arguments(tmp_path / "run", "--max_steps=150", "--lr=3e-3",
                                  "--warmup_steps=10", "--crop=(1.0,1.0)")])
    assert trace(tmp_path / "run")[-1][2] < 0.01


def test_temperature_above_the_cap_comes_back(arguments, tmp_path, monkeypatch):
    build = pretrain.CLIP

    def hot(config):
        clip = build(config)
        clip.logit_scale.data.fill_(6.0)
        return clip

    monkeypatch.setattr(pretrain, "CLIP", hot)
    here(arguments(tmp_path, "--max_steps=1"))
    weights = read_checkpoint(tmp_path / "ckpt.pt")["weights"]
    assert weights["logit_scale"].item() == pytest.approx(math.log(100))


def test_last_logged_rate_is_the_minimum(arguments, tmp_path):
    here(arguments(tmp_path, "--min_lr=1e-5"))
    assert trace(tmp_path)[-1][3] == pytest.approx(1e-5)


def test_an_epoch_is_as_many_steps_as_whole_batches(arguments, tmp_path):
    """Of 601 pairs each epoch has one batch of 350; two epochs would hold three."""
    here(arguments(tmp_path, "--max_steps=0", "--epochs=2", "--batch_size=350"))
    assert trace(tmp_path)[-1][0] == 2


def test_table_of_decay_groups_is_printed_once(arguments, tmp_path, capsys):
    here(arguments(tmp_path, "--max_steps=3"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "weight decay" in line]
    assert [line.split(":")[0] for line in lines] == ["weight decay 0.1", "weight decay 0.0"]


def test_the_first_moment_is_that_of_the_clipped_gradient(arguments, tmp_path):
    here(arguments(tmp_path, "--max_steps=1", "--beta1=0.9", "--grad_clip=0.25"))
    moments = read_checkpoint(tmp_path / "ckpt.pt")["optimizer"]["state"].values()
    norm = sum(moment["exp_avg"].square().sum().item() for moment in moments) ** 0.5
    assert trace(tmp_path)[0][5] > 0.25  # as it was before
    assert norm == pytest.approx(0.1 * 0.25, rel=1e-3)


def test_betas_and_eps_are_the_settings(arguments, tmp_path):
    here(arguments(tmp_path, "--max_steps=1", "--beta1=0.8", "--beta2=0.95", "--eps=1e-6"))
    for group in read_checkpoint(tmp_path / "ckpt.pt")["optimizer"]["param_groups"]:
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.95), 1e-6)


def test_each_setting_of_the_augmentation_arrives(arguments, tmp_path, monkeypatch):
    seen, real = [], pretrain.augment

    def note(images, draws, augmentation):
        seen.append(augmentation)
        return real(images, draws, augmentation)
    monkeypatch.setattr(pretrain, "augment", note)
    here(arguments(tmp_path, "--max_steps=1", "--crop=(0.3,0.9)", "--flip=0.1",
                   "--jitter=(0.1,0.2,0.3,0.05)", "--jitter_p=0.2", "--grey_p=0.3", "--blur_p=0.4",
                   "--blur_sigma=(0.5,1.5)"))
    assert seen == [Augmentation((0.3, 0.9), flip=0.1, jitter=(0.1, 0.2, 0.3, 0.05), jitter_p=0.2,
                                 grey_p=0.3, blur_p=0.4, blur_sigma=(0.5, 1.5))]


# ------------------------------------------------------------------------------ looks, logs, trace


@pytest.fixture(scope="module")
def watched(arguments, toy_world, tmp_path_factory):
    """(records of the log, checkpoint) of twelve steps that look at unseen sets every six."""
    folder = tmp_path_factory.mktemp("watched")
    here(arguments(folder, f"--held_out={toy_world}/pairs/held_out", "--eval_every=6",
                   f"--judgements={toy_world}/nights", f"--benchmarks={toy_world}/benchmarks"))
    with open(folder / "log.jsonl") as file:
        return [json.loads(line) for line in file], folder / "ckpt.pt"


def held_out_embeddings(clip, folder):
    """Unit embeddings (n, E), (n, E) of held-out pairs, one at a time."""
    from data.images import eval_image, normalise
    from data.pairs import HeldOut
    from data.text import Tokenizer
    pairs, words = HeldOut(folder), Tokenizer(clip.vocabulary)
    images = [clip.encode_image(normalise(eval_image(pairs.image(i), 32)[None]))
              for i in range(len(pairs))]
    return torch.cat(images), torch.cat([clip.encode_text(words(caption, 32))
                                         for caption in pairs.captions])


def test_looks_come_every_so_many_steps_and_at_the_end(watched):
    assert [record["step"] for record in watched[0] if "val_loss" in record] == [6, 12]


@torch.no_grad()
def test_held_out_figures_are_those_of_the_checkpoint(watched, toy_world):
    clip = load_clip(watched[1])
    images, texts = held_out_embeddings(clip, toy_world / "pairs/held_out")
    logits, labels = clip.logit_scale.exp() * images @ texts.T, torch.arange(53)  # (n, n)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert watched[0][-1]["val_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for side, scores in (("image", logits.T), ("text", logits)):
        right = (scores.argmax(1) == labels).float().mean().item()
        assert watched[0][-1][f"val_{side}_retrieval_recall@1"] == pytest.approx(right)


def test_watched_benchmarks_are_those_of_evaluate(watched, toy_world):
    from data.benchmarks import open_sets
    from evaluate import evaluate_set
    from data.text import Tokenizer
    clip, sets = load_clip(watched[1]), open_sets(toy_world / "benchmarks", partial=False)
    assert {f"zero_shot/{name}" for name in sets} <= watched[0][-1].keys()
    tasks = evaluate_set(clip, Tokenizer(clip.vocabulary), sets["toy_shape"])
    assert watched[0][-1]["zero_shot/toy_shape"] == tasks["toy_shape"]["metrics"]["acc1"]


def test_watched_judgements_are_those_of_evaluate(watched, toy_world):
    from data.triplets import Triplets
    from evaluate import evaluate_triplets
    clip, test = load_clip(watched[1]), Triplets(toy_world / "nights", "test")
    tasks = evaluate_triplets(clip.encode_image, test, 32, "cpu")
    assert [record["2afc/nights"] for record in watched[0] if "val_loss" in record][-1] == (
        pytest.approx(tasks["nights"]["metrics"]["2afc"], abs=1e-6))


def look_in_process(rank, checkpoint, world):
    """One of two ranks looks; rank 0 leaves the record beside the checkpoint."""
    from data.benchmarks import open_sets
    from data.judgements import open_judgements
    from data.pairs import HeldOut
    from data.text import Tokenizer
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{checkpoint}.store", rank=rank,
                            world_size=2)
    clip = load_clip(checkpoint)
    config = pretrain.Config(image_size=32, dtype="float32", batch_size=16)
    record = pretrain.look(clip, Tokenizer(clip.vocabulary), HeldOut(f"{world}/pairs/held_out"),
                           open_sets(f"{world}/benchmarks", partial=False),
                           open_judgements(f"{world}/nights", 6), 12, config, Ranks())
    if rank == 0:
        pathlib.Path(f"{checkpoint}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


def test_two_ranks_see_the_same_figures_as_one(watched, toy_world):
    torch.multiprocessing.spawn(look_in_process, (str(watched[1]), str(toy_world)), nprocs=2)
    record = json.loads(pathlib.Path(f"{watched[1]}.json").read_text())
    assert record == watched[0][-1]


def test_views_are_made_once_a_step_also_with_micro_batches(arguments, tmp_path, monkeypatch):
    """The cached gradient embeds each part twice, and augments it once."""
    sizes, real = [], pretrain.augment

    def count(images, draws, augmentation):
        sizes.append(len(images))
        return real(images, draws, augmentation)
    monkeypatch.setattr(pretrain, "augment", count)
    here(arguments(tmp_path, "--batch_size=16", "--micro_batch=4", "--max_steps=3"))
    assert sizes == [4] * 4 * 3


def test_operations_are_counted_for_the_captions_of_the_batch():
    """Captions of 3 and 7 ids with start and end: 5 in the mean, of 32 that fit."""
    from model import CLIP, SIZES, flops_per_pair
    clip = CLIP(SIZES["toy"])
    tokens = torch.zeros(2, 32, dtype=torch.long)
    tokens[0, 2], tokens[1, 6] = 1023, 1023                       # the end token is the largest
    rows = {"image": torch.eye(2), "text": torch.eye(2)}
    config = pretrain.Config(batch_size=2)
    _, flops = pretrain.step_figures(torch.tensor(1.0), rows, tokens, clip, config, Ranks())
    assert flops == flops_per_pair(clip.config, 5)
    assert flops < flops_per_pair(clip.config) / 1.5


def figures_of(image, text, batch_size=2, ranks=None):
    """Figures of a step whose loss is 2, of unit rows of pictures and captions."""
    rows, tokens = {"image": torch.tensor(image), "text": torch.tensor(text)}, torch.eye(2).long()
    figures, _ = pretrain.step_figures(torch.tensor(2.0), rows, tokens, CLIP(SIZES["toy"]),
                                       pretrain.Config(batch_size=batch_size), ranks or Ranks())
    return figures


def test_accuracy_is_how_often_a_picture_finds_its_caption():
    """The second picture is nearer to the first caption; each caption's nearest is its own."""
    assert figures_of([[1.0, 0.0], [0.8, 0.6]], [[1.0, 0.0], [0.0, 1.0]])["accuracy"] == 0.5


def test_loss_and_accuracy_are_means_over_ranks():
    ranks = types.SimpleNamespace(mean=lambda figures: (figures / 2).tolist())  # the other has 0
    figures = figures_of([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], ranks=ranks)
    assert (figures["loss"], figures["accuracy"]) == (1.0, 0.5)


def test_the_loss_of_chance_is_that_of_all_ranks_pairs():
    figures = figures_of([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], batch_size=8)
    assert figures["chance_loss"] == pytest.approx(math.log(8))


def test_the_recipe_that_profiles_leaves_a_trace_of_five_steps(arguments, tmp_path):
    here(arguments(tmp_path, "configs/trace.py", "--max_steps=8"))
    events = json.loads((tmp_path / "trace_0.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events) == 5


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard"),
                                          ("wandb", "wandb")])
def test_missing_log_package_is_one_line_with_its_cure(arguments, tmp_path, monkeypatch, name,
                                                       module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install {name}$"):
        here(arguments(tmp_path, f"--log_to={name}", "--max_steps=1"))


def test_wandb_is_sent_what_the_log_holds(arguments, tmp_path, monkeypatch):
    sent = []
    wandb = types.SimpleNamespace(init=lambda **_: None,
                                  log=lambda record, step: sent.append((step, record)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    here(arguments(tmp_path, "--log_to=wandb", "--max_steps=2"))
    with open(tmp_path / "log.jsonl") as file:
        assert sent == [(record["step"], record) for record in map(json.loads, file)]


# ---------------------------------------------------------------------- perceptual initialization


def vision_checkpoint(path, **changes):
    """A stage-1 checkpoint of the toy size, as perceptual_init.py writes it."""
    from model import FORMAT, VisionTower, write_checkpoint
    config = dataclasses.replace(SIZES["toy"], **changes)
    torch.manual_seed(5)
    tower = VisionTower(config)
    write_checkpoint(path, {"format": FORMAT, "kind": "vision", "model": dataclasses.asdict(config),
                            "weights": tower.state_dict(), "optimizer": None, "step": 1,
                            "samples": 1, "config": {}, "data": "", "vocabulary": None})
    return tower


def start_of(argv, monkeypatch):
    """What the first step of a run meets: batch bytes, draws, tokens, text and vision weights."""
    from model import weights_checksum
    seen = {}
    gradient, augment = pretrain.whole_gradient, pretrain.augment

    def look_at_weights(model, *rest):
        seen.setdefault("text", weights_checksum(model.clip.text.state_dict()))
        seen.setdefault("vision", weights_checksum(model.clip.vision.state_dict()))
        return gradient(model, *rest)

    def look_at_batch(images, draws, augmentation):
        seen.setdefault("batches", []).append((images.sum().item(), draws.sum().item()))
        return augment(images, draws, augmentation)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "whole_gradient", look_at_weights)
        patch.setattr(pretrain, "augment", look_at_batch)
        here(argv)
    return seen


def test_arms_differ_in_the_vision_tower_and_in_nothing_else(arguments, tmp_path, monkeypatch):
    from model import weights_checksum
    tower = vision_checkpoint(tmp_path / "vision.pt")
    base = start_of(arguments(tmp_path / "a", "--max_steps=3"), monkeypatch)
    ours = start_of(arguments(tmp_path / "b", "--max_steps=3",
                              f"--init_vision={tmp_path}/vision.pt"), monkeypatch)
    assert base["batches"] == ours["batches"] and base["text"] == ours["text"]
    assert ours["vision"] == weights_checksum(tower.state_dict()) != base["vision"]


def test_another_seed_starts_from_other_weights(arguments, tmp_path, monkeypatch):
    starts = [start_of(arguments(tmp_path / str(seed), "--max_steps=1", f"--seed={seed}"), monkeypatch)
              for seed in (1, 2)]
    assert starts[0]["text"] != starts[1]["text"] and starts[0]["vision"] != starts[1]["vision"]


def test_missing_vision_checkpoint_is_fatal(arguments, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        here(arguments(tmp_path / "run", f"--init_vision={tmp_path}/nowhere.pt"))
    assert not (tmp_path / "run/log.jsonl").exists()


def test_vision_checkpoint_of_another_size_is_refused(arguments, tmp_path):
    vision_checkpoint(tmp_path / "vision.pt", vision_layers=2)
    with pytest.raises(ValueError, match="its vision_layers is 2, this run's 3"):
        here(arguments(tmp_path / "run", f"--init_vision={tmp_path}/vision.pt"))


def test_a_tower_of_another_length_of_captions_is_a_start(arguments, tmp_path, monkeypatch):
    """It reads no captions: what its size says of them is nothing of it."""
    from model import weights_checksum
    tower = vision_checkpoint(tmp_path / "vision.pt", context_length=77)
    ours = start_of(arguments(tmp_path / "run", "--max_steps=1",
                              f"--init_vision={tmp_path}/vision.pt"), monkeypatch)
    assert ours["vision"] == weights_checksum(tower.state_dict())


def test_partial_vision_checkpoint_is_refused_by_tensor_name(arguments, tmp_path):
    from model import write_checkpoint
    vision_checkpoint(tmp_path / "vision.pt")
    content = read_checkpoint(tmp_path / "vision.pt")
    del content["weights"]["blocks.1.qkv.bias"]
    write_checkpoint(tmp_path / "vision.pt", content)
    with pytest.raises(ValueError, match="blocks.1.qkv.bias"):
        here(arguments(tmp_path / "run", f"--init_vision={tmp_path}/vision.pt"))


# -------------------------------------------------------------------------- what goes wrong


def nan_recipe(path, when):
    """A recipe whose augment spoils the first image of a rank's batch where `when` holds."""
    path.write_text(f"""
import os
import data.images
_calls = [0]
def augment(images, draws, augmentation):
    views = data.images.augment_batch(images, draws, augmentation)
    _calls[0] += 1
    if {when}:
        views[0] = float("nan")
    return views
""")
    return str(path)


def test_step_without_a_finite_gradient_is_skipped_and_its_sample_named(arguments, tmp_path):
    recipe = nan_recipe(tmp_path / "nan.py", "_calls[0] == 3")
    codes, outputs = finish(process([recipe, *arguments(tmp_path / "run", "--max_steps=5")]))
    assert codes == [0], outputs
    assert outputs[0].count("skipped") == 1 and "step 3 skipped" in outputs[0]
    assert ".tar:" in outputs[0].split("step 3 skipped")[1].split("\n")[0]
    weights = read_checkpoint(tmp_path / "run/ckpt.pt")["weights"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_nan_on_one_of_two_ranks_skips_the_step_on_both(arguments, tmp_path):
    recipe = nan_recipe(tmp_path / "nan.py", "_calls[0] == 2 and os.environ['RANK'] == '1'")
    codes, outputs = finish(process([recipe, *arguments(tmp_path / "run", "--max_steps=4")],
                                    world=2))
    assert codes == [0, 0], outputs
    assert "step 2 skipped" in outputs[0]
    assert [r[0] for r in trace(tmp_path / "run")] == [1, 2, 3, 4]


def test_five_steps_without_a_finite_gradient_stop_the_run(arguments, tmp_path):
    recipe = nan_recipe(tmp_path / "nan.py", "_calls[0] >= 3")
    codes, outputs = finish(process([recipe, *arguments(tmp_path / "run")]))
    assert codes == [2] and "five steps up to 7" in outputs[0]
    weights = read_checkpoint(tmp_path / "run/ckpt.pt")["weights"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def shards_with_bad_images(folder, share):
    """1,200 drawn pictures of which `share` hold bytes that are no picture, every tenth caption."""
    import io
    import numpy as np
    from PIL import Image
    from data.prepare.tars import write_shards
    rng, samples = np.random.default_rng(0), []
    for i in range(1200):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
        data = b"<html>gone</html>" if rng.random() < share else file.getvalue()
        samples.append((f"{i:04}", "png", data, [f"a red circle {i % 10}"]))
    write_shards(folder, samples)


def test_too_many_bad_images_stop_both_ranks_with_the_reasons(arguments, tmp_path):
    shards_with_bad_images(tmp_path / "pairs", 0.3)
    codes, outputs = finish(process(
        arguments(tmp_path / "run", f"--data={tmp_path}/pairs", "--batch_size=64", "--max_steps=100",
                  "--save_every=100"), world=2))
    assert codes == [2, 2] and "more than 1%" in outputs[0] and "x " in outputs[0]


def test_a_few_bad_images_are_replaced_counted_and_named(arguments, tmp_path):
    shards_with_bad_images(tmp_path / "pairs", 0.003)
    codes, outputs = finish(process(
        arguments(tmp_path / "run", f"--data={tmp_path}/pairs", "--batch_size=200", "--max_steps=6",
                  "--save_every=100"), world=2))
    named = (tmp_path / "run/bad_samples.tsv").read_text().splitlines()
    counted = read_checkpoint(tmp_path / "run/ckpt.pt")["bad"]
    assert codes == [0, 0] and len(named) == sum(counted.values()) > 0


def test_the_count_of_bad_images_goes_on_with_the_run(arguments, tmp_path):
    shards_with_bad_images(tmp_path / "pairs", 0.005)
    argv = [f"--data={tmp_path}/pairs", "--batch_size=200", "--save_every=100"]
    here(arguments(tmp_path / "whole", *argv, "--max_steps=6"))
    here(arguments(tmp_path / "cut", *argv, "--max_steps=5"))
    first = read_checkpoint(tmp_path / "cut/ckpt.pt")["bad"]
    here(arguments(tmp_path / "cut", *argv, "--max_steps=6", "--change=max_steps"))
    assert sum(first.values()) > 0
    assert (read_checkpoint(tmp_path / "cut/ckpt.pt")["bad"]
            == read_checkpoint(tmp_path / "whole/ckpt.pt")["bad"])


@pytest.mark.parametrize("extra, words", [
    (["--data=nowhere"], "nowhere"),
    (["--vocabulary=nowhere.tiktoken"], "nowhere.tiktoken"),
    (["--batch_size=100000"], "batch_size=100000 is more than"),
    (["--model=ViT-B-23"], "did you mean ViT-B-32"),
    (["--decay=cosin"], "did you mean cosine"),
])
def test_bad_input_is_one_line_and_leaves_nothing(arguments, tmp_path, extra, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        here(arguments(tmp_path / "run", *extra))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_batch_that_does_not_divide_names_neighbours_that_do(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="not a multiple of 6 ranks; try 18 or 12"):
        here(arguments(tmp_path))


@pytest.mark.parametrize("extra, words", [
    (["--image_size=36"], "image_size=36: must be a multiple of toy's patch; try 32 or 40"),
    (["--init=a.pt", "--init_vision=b.pt"], "init=a.pt: brings its vision tower"),
])
def test_settings_that_do_not_fit_each_other_are_one_line(arguments, tmp_path, extra, words):
    with pytest.raises(ValueError, match=words):
        here(arguments(tmp_path / "run", *extra))


def test_without_a_compiler_compiling_is_refused_before_any_work(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C.. compiler.* --compile=false"):
        here(arguments(tmp_path / "run", "--compile=true"))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------- a run that goes on


def test_the_advised_cure_of_a_nan_works_and_is_remembered(arguments, tmp_path):
    here(arguments(tmp_path, "--max_steps=2"))
    here(arguments(tmp_path, "--max_steps=4", "--lr=1e-4", "--change=lr,max_steps"))
    with open(tmp_path / "log.jsonl") as file:
        records = [json.loads(line) for line in file]
    changed = [record for record in records if "changed" in record]
    assert [(r["step"], r["changed"]["lr"]) for r in changed] == [(2, [1e-3, 1e-4])]
    command = (tmp_path / "record/command.txt").read_text().splitlines()[-1]
    assert command.endswith("from step 2; lr was 0.001, is 0.0001; max_steps was 2, is 4")
    assert read_checkpoint(tmp_path / "ckpt.pt")["config"]["lr"] == 1e-4


def test_another_decay_of_weights_is_in_force_after_the_change(arguments, tmp_path):
    here(arguments(tmp_path, "--max_steps=2"))
    here(arguments(tmp_path, "--max_steps=3", "--weight_decay=0.5",
                   "--change=weight_decay,max_steps"))
    groups = read_checkpoint(tmp_path / "ckpt.pt")["optimizer"]["param_groups"]
    assert groups[0]["weight_decay"] == 0.5


def test_a_moved_folder_goes_on(arguments, tmp_path):
    here(arguments(tmp_path / "a", "--max_steps=12"))
    finish(process(["step", "7", *arguments(tmp_path / "b")], code=KILL))
    (tmp_path / "b").rename(tmp_path / "c")
    here(arguments(tmp_path / "c"))
    assert trace(tmp_path / "c") == trace(tmp_path / "a")


def test_a_run_without_its_recipe_is_another_run(arguments, tmp_path):
    recipe = tmp_path / "flat.py"
    recipe.write_text("def lr_at(step, total_steps, config):\n    return config.lr\n")
    here([str(recipe), *arguments(tmp_path / "run", "--max_steps=2")])
    with pytest.raises(ValueError, match=r"hooks was \{'lr_at': 'flat'\}"):
        here(arguments(tmp_path / "run", "--max_steps=2"))


def test_a_checkpoint_of_groups_goes_on_with_alone_only(arguments, tmp_path):
    """exact_negatives=False of earlier versions is configs/ideas/alone.py now."""
    from model import write_checkpoint
    here(arguments(tmp_path, "--max_steps=2"))
    content = read_checkpoint(tmp_path / "ckpt.pt")
    content["config"] |= {"exact_negatives": False, "keep_last": 1, "overfit": 0,
                          "profile": True}
    del content["hooks"]
    write_checkpoint(tmp_path / "ckpt.pt", content)
    with pytest.raises(ValueError, match="hooks was .*configs.ideas.alone"):
        here(arguments(tmp_path, "--max_steps=2"))
    here([str(ROOT / "configs/ideas/alone.py"), *arguments(tmp_path, "--max_steps=2")])


def test_nodes_that_do_not_share_out_dir_stop_with_one_line_each(arguments, tmp_path):
    here(arguments(tmp_path / "node0", "--max_steps=2"))
    code = ("import os, sys, pretrain; from data.log import run_main\n"
            "folder = f'{sys.argv.pop(1)}/node' + os.environ['RANK']\n"
            "run_main(lambda: pretrain.main([*sys.argv[1:], f'--out_dir={folder}']))")
    codes, outputs = finish(process([str(tmp_path), *arguments("none")], code=code, world=2))
    assert codes == [2, 2]
    assert "rank 0 and rank 1 differ on whether" in outputs[0] and outputs[0].count("\n") == 1
    assert ", rank 1: rank 0 and rank 1 differ" in outputs[1] and outputs[1].count("\n") == 1


def test_more_ranks_than_gpus_are_refused_with_their_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="more ranks than the 2 GPUs there are"):
        Ranks().start()


def test_an_error_of_one_rank_is_printed_with_its_rank(arguments, tmp_path):
    recipe = tmp_path / "odd.py"
    recipe.write_text("import os\ndef prepare_model(clip, config):\n"
                      "    if os.environ['RANK'] == '1':\n        raise ValueError('no luck')\n")
    _, outputs = finish(process([str(recipe), *arguments(tmp_path / "run")], world=2))
    assert ", rank 1: no luck\n" in outputs[1]


def interrupt(argv, code, when, times=1):
    """Ctrl-C, `times` times, once the output has the word `when`; exit code and seconds after."""
    started, = process(argv, code=code)
    for line in started.stdout:
        if when in line:
            break
    asked = time.time()
    for _ in range(times):
        started.send_signal(signal.SIGINT)
        time.sleep(0.2)
    started.communicate(timeout=60)
    return started.returncode, time.time() - asked


SLOW = '''
import signal, sys, time, pretrain
from data.log import run_main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
place = sys.argv.pop(1)
def slow(*arguments):
    print("now", flush=True); time.sleep(30)
if place == "index": pretrain.index_shards = slow
if place == "first": pretrain.whole_gradient = slow
if place == "later":
    after_step = pretrain.after_step
    def then_slow(clip, step, *rest):
        after_step(clip, step, *rest)
        if step == 2: slow()
    pretrain.after_step = then_slow
run_main(lambda: pretrain.main(sys.argv[1:]))
'''


@pytest.mark.parametrize("place, times", [("index", 1), ("first", 1), ("later", 2)])
def test_ctrl_c_ends_at_once_before_the_first_step_and_when_repeated(arguments, tmp_path, place,
                                                                     times):
    code, seconds = interrupt([place, *arguments(tmp_path)], SLOW, "now", times)
    assert code in (130, -signal.SIGINT) and seconds < 20


def test_ctrl_c_later_saves_and_keeps_a_shell_from_going_on(arguments, tmp_path):
    argv = arguments(tmp_path, "--max_steps=100000", "--save_every=100000")
    code, _ = interrupt(["nowhere", *argv], SLOW, " 3/100000", 1)
    assert code == 130 and read_checkpoint(tmp_path / "ckpt.pt")["step"] >= 3


SAYS_NO = '''
import sys, pretrain
def global_loss(rows, config, ranks):
    raise ValueError("the loss says no")
pretrain.global_loss = global_loss
pretrain.run_main(lambda: pretrain.main(sys.argv[1:]))
'''


def test_an_error_beside_loader_processes_is_one_line(arguments, tmp_path):
    codes, outputs = finish(process(arguments(tmp_path, "--workers=2"), code=SAYS_NO))
    assert codes == [2] and outputs[0].splitlines()[-1] == "-c: the loss says no"


def test_a_full_disk_costs_a_line_of_the_log_and_no_more(arguments, tmp_path, monkeypatch, capsys):
    from data import log

    def no_room(path, mode="r", **kwargs):
        if str(path).endswith("log.jsonl") and mode == "a":
            raise OSError(28, "No space left on device")
        return open(path, mode, **kwargs)

    monkeypatch.setattr(log, "open", no_room, raising=False)
    here(arguments(tmp_path, "--max_steps=2"))
    assert "a line was not written ([Errno 28] No space left" in capsys.readouterr().out


def test_loader_processes_that_are_not_forked_know_the_recipe_s_functions(arguments, tmp_path):
    """macOS and Python 3.14 start them afresh: functions are imported there, settings are sent."""
    recipe = tmp_path / "noisy.py"
    recipe.write_text("amount: float = 2.0\n"
                      "def extra_arrays(pairs, sample, caption, rng, config):\n"
                      "    return {'noise': rng.random(3) * config.amount}\n"
                      "def pick_caption(count, rng):\n    return 0\n")
    script = tmp_path / "start.py"
    script.write_text("import multiprocessing, sys\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\n"
                      "import pretrain\n"
                      "if __name__ == '__main__':\n"
                      "    multiprocessing.set_start_method('spawn')\n"
                      "    pretrain.run_main(lambda: pretrain.main(sys.argv[1:]))\n")
    done = subprocess.run([sys.executable, script, recipe, *arguments(
        tmp_path / "run", "--max_steps=2", "--workers=1", "--amount=3")], cwd=ROOT, timeout=120,
        text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
