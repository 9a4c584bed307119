"""configs/ideas: every idea gives the same whatever micro-batches, ranks and interruptions."""
import dataclasses
import json
import pathlib
import types

import pytest
import torch
import torch.nn.functional as F

import pretrain
from configs import load_config
from data.ranks import Ranks
from data.text import Tokenizer
from model import (CLIP, FORMAT, SIZES, VisionTower, load_clip, read_checkpoint,
                   write_checkpoint)
from tests.test_pretrain import finish, process
from tests.test_pretrain import here as run

ROOT = pathlib.Path(__file__).resolve().parent.parent
ON_STAGE_1 = {"same_pictures"}  # recipes over perceptual_init.py: tests/test_perceptual_init.py
IDEAS = sorted({path.stem for path in (ROOT / "configs/ideas").glob("*.py")} - ON_STAGE_1)
OPTIONS = {  # so that an idea shows at a batch of 16, with files that are there
    "alone": ["--group=6"], "captions": ["--data={world}/pairs/held_out", "--grouping=1"],
    "degla": ["--momentum=0.8"], "lit": ["--init_vision="],
    "longer_baseline": ["--stage_1={tower}"], "metaclip": ["--at_most=20"],
    "mimetic_init": ["--lr=5e-4"],  # its attention is sharp: rounding grows with the steps
    "modx": ["--init={start}"], "momentum": ["--momentum=0.8"],
    "permuted_init": ["--init_vision={tower}"], "refine": ["--init="],
    "zscl": ["--init={start}"]}
OWN_TOWERS = {"fdt", "vitamin"}  # a plain CLIP would be another model than the one trained
ON_RANKS = {"siglip", "mosaic", "slip", "negclip", "zscl", "sycoca", "fdt"}  # each gathers its way


@pytest.fixture(scope="module")
def start(toy_world, tmp_path_factory):
    """A whole CLIP of the toy's size, for ideas that begin with a trained one."""
    tokenizer = Tokenizer(toy_world / "vocabulary/toy.tiktoken")
    torch.manual_seed(0)
    clip = CLIP(dataclasses.replace(SIZES["toy"], vocab_size=tokenizer.size))
    path = tmp_path_factory.mktemp("start") / "ckpt.pt"
    write_checkpoint(path, {"format": FORMAT, "kind": "clip", "weights": clip.state_dict(),
                            "model": dataclasses.asdict(clip.config),
                            "vocabulary": tokenizer.text})
    return path


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A vision tower of the toy's size, as stage 1 leaves it: for the controls."""
    size = dataclasses.replace(SIZES["toy"], vocab_size=0)  # stage 1 has no vocabulary
    path = tmp_path_factory.mktemp("stage_1") / "ckpt.pt"
    write_checkpoint(path, {"format": FORMAT, "kind": "vision", "samples": 32,
                            "model": dataclasses.asdict(size),
                            "weights": VisionTower(size).state_dict()})
    return path


@pytest.fixture(scope="module")
def arguments(toy_world, start, tower):
    """arguments(idea, out_dir, *more) of a six-step run of 16 pairs on the small toy world."""
    def build(idea, out_dir, *more):
        return [str(ROOT / "configs/toy.py"), str(ROOT / f"configs/ideas/{idea}.py"),
                f"--data={toy_world}/pairs", f"--vocabulary={toy_world}/vocabulary/toy.tiktoken",
                "--held_out=", f"--out_dir={out_dir}", "--batch_size=16", "--max_steps=6",
                "--warmup_steps=2", "--workers=0", "--log_every=1", "--save_every=3",
                "--keep_at=()", *more,
                *[option.format(world=toy_world, start=start, tower=tower)
                  for option in OPTIONS.get(idea, [])]]
    return build


def figures(out_dir):
    """Loss, norm of the gradient and temperature of each step."""
    with open(f"{out_dir}/log.jsonl") as file:
        records = [json.loads(line) for line in file]
    return [[record[key] for key in ("loss", "grad_norm", "scale")] for record in records
            if "loss" in record]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """whole(idea) -> folder of a run that nothing interrupted, in one piece on one rank."""
    known = {}

    def of(idea):
        if idea not in known:
            known[idea] = tmp_path_factory.mktemp(idea)
            run(arguments(idea, known[idea]))
        return known[idea]
    return of


@pytest.mark.parametrize("idea", IDEAS)
def test_micro_batches_give_the_steps_of_the_whole(arguments, whole, tmp_path, idea):
    run(arguments(idea, tmp_path, "--micro_batch=8"))
    for ours, theirs in zip(figures(tmp_path), figures(whole(idea)), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)  # fp32 in another order, six steps long


@pytest.mark.parametrize("idea", IDEAS)
def test_a_run_that_stopped_goes_on_to_the_same_digits(arguments, whole, tmp_path, idea,
                                                       monkeypatch):
    expected, gradient, steps = figures(whole(idea)), pretrain.whole_gradient, []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return gradient(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "whole_gradient", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(arguments(idea, tmp_path))
    run(arguments(idea, tmp_path))
    assert figures(tmp_path) == expected


TWO_RANKS = '''
import json, sys, pretrain, torch.distributed as dist
from data.ranks import Ranks
join = dist.init_process_group
dist.init_process_group = lambda how: None if dist.is_initialized() else join(how)
Ranks.leave = lambda ranks: None
for arguments in json.loads(sys.argv[1]):
    pretrain.main(arguments)
dist.destroy_process_group()
'''


@pytest.fixture(scope="module")
def on_two_ranks(arguments, tmp_path_factory):
    """{idea: folder of its run on two ranks}; one pair of processes makes them all."""
    folders = {idea: tmp_path_factory.mktemp(idea) for idea in sorted(ON_RANKS)}
    runs = json.dumps([arguments(idea, folder) for idea, folder in folders.items()])
    codes, outputs = finish(process([runs], code=TWO_RANKS, world=2))
    assert codes == [0, 0], outputs
    return folders


@pytest.mark.parametrize("idea", sorted(ON_RANKS))
def test_two_ranks_make_the_steps_of_one(whole, on_two_ranks, idea):
    ours, theirs = figures(on_two_ranks[idea]), figures(whole(idea))
    for step, other in zip(ours, theirs, strict=True):
        assert step == pytest.approx(other, rel=2e-4)


@pytest.mark.parametrize("idea", IDEAS)
def test_a_checkpoint_opens_without_what_only_training_needs(whole, idea):
    if idea in OWN_TOWERS:
        with pytest.raises(ValueError, match="tensor .* is (none of this model's|missing)"):
            load_clip(whole(idea) / "ckpt.pt")
    else:
        assert not list(load_clip(whole(idea) / "ckpt.pt").extra.parameters())
    assert read_checkpoint(whole(idea) / "ckpt.pt")["hooks"]
    record = whole(idea) / "record"
    assert list(record.rglob(f"{idea}.py")) and list(record.rglob("toy.py"))


@pytest.mark.parametrize("idea", [*IDEAS, *sorted(ON_STAGE_1)])
def test_an_idea_is_at_most_forty_lines_of_code(idea):
    import ast
    source = (ROOT / f"configs/ideas/{idea}.py").read_text()
    body = ast.parse(source).body
    code = source.splitlines()[body[0].end_lineno:]  # behind the docstring
    lines = [line for line in code if line.strip() and not line.strip().startswith("#")]
    assert ast.get_docstring(ast.parse(source)) and len(lines) <= 40


# ------------------------------------------------------------------------ the facts of each idea


def hooks_of(idea):
    """pretrain's functions as the idea replaces them; the plain ones come back with it."""
    load_config(pretrain.Config, vars(pretrain), [str(ROOT / f"configs/ideas/{idea}.py")])
    found = types.SimpleNamespace(**{name: getattr(pretrain, name) for name in pretrain.HOOKS})
    load_config(pretrain.Config, vars(pretrain), [])
    return found


def random_rows(b, width=8, seed=0):
    torch.manual_seed(seed)
    image, text = (F.normalize(torch.randn(b, width, dtype=torch.float64), dim=1) for _ in range(2))
    return {"image": image, "text": text, "scale": torch.tensor(5.0, dtype=torch.float64)}


def test_siglip_equals_the_double_loop_over_pairs():
    rows = random_rows(6) | {"bias": torch.tensor(-2.0, dtype=torch.float64)}
    expected = 0.0
    for i in range(6):
        for j in range(6):
            score = 5.0 * rows["image"][i] @ rows["text"][j] - 2.0
            sign = 1 if i == j else -1
            expected -= torch.log(1 / (1 + torch.exp(-sign * score)))
    loss = hooks_of("siglip").global_loss(rows, None, Ranks())
    assert loss.item() == pytest.approx(expected.item() / 6, rel=1e-12)


def test_siglip_equals_open_clips_loss():
    open_clip_loss = pytest.importorskip("open_clip.loss", reason="open_clip is not installed")
    rows = random_rows(9) | {"bias": torch.tensor(-2.0, dtype=torch.float64)}
    theirs = open_clip_loss.SigLipLoss()(rows["image"], rows["text"], rows["scale"], rows["bias"])
    loss = hooks_of("siglip").global_loss(rows, None, Ranks())
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_siglip_starts_at_a_bias_of_minus_10_and_a_scale_of_10():
    clip = CLIP(SIZES["toy"])
    hooks_of("siglip").prepare_model(clip, None)
    assert clip.extra.bias.item() == -10
    assert clip.logit_scale.exp().item() == pytest.approx(10)


def test_alone_in_one_group_is_the_plain_loss():
    rows, config = random_rows(6), types.SimpleNamespace(group=6, loss_chunk=0)
    ours = hooks_of("alone").global_loss(rows, config, Ranks())
    assert ours.item() == pytest.approx(pretrain.global_loss(rows, config, Ranks()).item(), rel=1e-14)
