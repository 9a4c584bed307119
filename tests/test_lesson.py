"""docs/lesson.md: its recipes load, its edits fit the scripts, its commands name what exists."""
import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pretrain
from configs import load_config
from data.images import Augmentation
from data.pairs import Pairs
from data.ranks import Ranks
from data.shards import Shards, index_shards
from data.text import Tokenizer
from model import CLIP, SIZES

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/lesson.md").read_text()
FILES = dict(re.findall(r"cat > (mine/\S+) <<'END'\n(.*?\n)END\n", PAGE, re.S))  # here-documents
PROGRAMS = set(re.findall(r"python (mine/\S+\.py)", PAGE))
RECIPES = sorted(name for name in FILES if name.endswith(".py") and name not in PROGRAMS)
OURS = ("perceptual_init.py", "pretrain.py", "evaluate.py")


def read_steps():
    """The page's steps in order: (file, diff) of an edit, ("", line) of a command."""
    steps = []
    blocks = re.findall(r"(?:<!-- edit: (\S+) -->\n)?```(bash|diff)\n(.*?)```", PAGE, re.S)
    for file, kind, body in blocks:
        if kind == "diff":
            steps.append((file, body))
            continue
        shell = re.sub(r"<<'END'\n.*?\nEND\n", "\n", body, flags=re.S)
        for line in shell.replace("\\\n", " ").splitlines():
            steps.append(("", line))
    return steps


STEPS = read_steps()
EDITS = [(file, diff) for file, diff in STEPS if file]
COMMANDS = [line for file, line in STEPS if not file]


def lines_of(diff, sign):
    return "".join(line[1:] + "\n" for line in diff.splitlines() if line.startswith(sign))


def arguments_of(command):
    """(script, its arguments) of a command, ("", []) where it starts none of ours."""
    words = command.split()
    if words[:2] == ["bash", "mine/arm.sh"]:
        return "pretrain.py", ["configs/toy.py", *words[3:]]
    for place, word in enumerate(words):
        if word in OURS:
            return word, words[place + 1:]
    return "", []


def load(script, arguments, folder):
    """The script and its config, with the page's recipes written to a folder."""
    for name, text in FILES.items():
        (folder / Path(name).name).write_text(text)
    placed = []
    for argument in arguments:
        name = Path(argument).name
        placed.append(str(folder / name) if argument in FILES else argument)
    module = importlib.import_module(script.removesuffix(".py"))
    config, _ = load_config(module.Config, vars(module), placed)
    return module, config


@pytest.fixture(autouse=True)
def own_functions():
    """A recipe's functions stand in pretrain.py until the next recipe is read."""
    yield
    load_config(pretrain.Config, vars(pretrain), [])


# ---------------------------------------------------------------------------- the page


def test_the_page_has_eight_exercises_and_about_1500_words():
    assert re.findall(r"^## (\d)\. ", PAGE, re.M) == list("12345678")
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.S)
    prose = re.sub(r"^\|.*$|<.*?>", "", prose, flags=re.M)  # tables, marks
    assert 1000 < len(prose.split()) <= 1600


def test_the_timetable_fills_ninety_minutes():
    rows = re.findall(r"^\| (\d+) - (\d+) \|", PAGE, re.M)
    ends = [int(end) for _, end in rows]
    assert [int(start) for start, _ in rows] == [0, *ends[:-1]]
    assert ends[-1] == 90


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".py")])
def test_a_recipe_has_at_most_ten_lines_and_everything_is_python(name):
    tree = ast.parse(FILES[name])
    if name in RECIPES:
        assert ast.get_docstring(tree)
        code = FILES[name].splitlines()[tree.body[0].end_lineno:]
        assert len([line for line in code if line.strip()]) <= 10


def test_edits_fit_the_scripts_as_they_stand_and_are_taken_back():
    sources = {}
    for file, text in STEPS:
        if file:
            source = sources.get(file, (ROOT / file).read_text())
            before, after = lines_of(text, "-"), lines_of(text, "+")
            assert before and source.count(before) == 1, f"{file}: {before}"
            sources[file] = source.replace(before, after)
            ast.parse(sources[file])
        elif text.startswith("git checkout "):
            del sources[text.removeprefix("git checkout ")]
    assert EDITS and not sources


@pytest.mark.parametrize("command", [line for line in COMMANDS if arguments_of(line)[0]])
def test_a_command_names_recipes_and_settings_that_exist(command, tmp_path):
    load(*arguments_of(command), tmp_path)  # an unknown name is a ValueError


def test_every_recipe_is_run():
    text = "\n".join(COMMANDS)
    assert RECIPES and all(name in text for name in RECIPES)


def test_no_two_runs_share_a_folder():
    """The second would go on at the first one's last step, and train nothing."""
    names = []
    for command in COMMANDS:
        names += re.findall(r"arm\.sh (\w+)|--out_dir=out/lesson/(\w+)", command)
    names = ["".join(name) for name in names]
    assert len(names) > 5 and len(set(names)) == len(names)


# ---------------------------------------------------------------- what its files compute


def test_figures_are_mean_deviation_and_interval_over_three_seeds(tmp_path):
    logs = {"plain": (0.04, 0.05, 0.03), "new": (0.05, 0.08, 0.05)}
    for arm, values in logs.items():
        for seed, value in enumerate(values, 1):
            folder = tmp_path / f"out/lesson/{arm}_{seed}"
            folder.mkdir(parents=True)
            early = {"step": 1, "loss": 5.0, "scale": 14.0}
            late = {"step": 2, "val_loss": 4.0, "val_mean_recall@1": value,
                    "val_image_retrieval_recall@1": value, "val_text_retrieval_recall@1": value}
            (folder / "log.jsonl").write_text(json.dumps(early) + "\n" + json.dumps(late) + "\n")
    program = tmp_path / "figures.py"
    program.write_text(FILES["mine/figures.py"])
    done = subprocess.run([sys.executable, str(program), "plain", "new"], cwd=tmp_path,
                          capture_output=True, text=True, check=True)
    row = done.stdout.splitlines()[1].split()  # gains of 1, 3 and 2 points
    assert row[:6] == ["val_mean_recall@1", "new", "6.00", "±", "1.73", "+2.00"]
    low, high = (float(word.strip("[],")) for word in row[6:])
    assert low == pytest.approx(2 - 4.303 / 3 ** 0.5, abs=0.01)  # t of 2 degrees of freedom
    assert high == pytest.approx(2 + 4.303 / 3 ** 0.5, abs=0.01)


@pytest.mark.parametrize("recipes, moves", [(["mine/cap.py"], True),
                                            (["mine/cap.py", "mine/inside.py"], False)])
def test_a_clamp_within_the_loss_leaves_the_temperature_no_gradient(tmp_path, recipes, moves):
    module, config = load("pretrain.py", recipes, tmp_path)
    torch.manual_seed(0)
    clip = CLIP(SIZES["toy"])
    module.prepare_model(clip, config)
    tokens = torch.tensor([[1022, 5, 1023], [1022, 6, 1023], [1022, 7, 1023], [1022, 8, 1023]])
    rows = module.encode(clip, {"views": torch.randn(4, 3, 32, 32), "tokens": tokens}, config)
    assert rows["scale"].item() == pytest.approx(100, rel=1e-6)
    module.global_loss(rows, pretrain.Config(), Ranks()).backward()
    assert bool(clip.logit_scale.grad != 0) == moves


def test_one_way_is_the_first_half_of_the_plain_loss(tmp_path):
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(2, 6, 8, dtype=torch.float64), dim=-1)
    scale = torch.tensor(5.0, dtype=torch.float64)
    module, config = load("pretrain.py", ["mine/one_way.py"], tmp_path)
    loss = module.global_loss({"image": image, "text": text, "scale": scale}, config, Ranks())
    odds = (5 * image @ text.T).exp()
    expected = -(odds.diagonal() / odds.sum(1)).log().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_wrong_gives_half_of_the_pairs_their_neighbours_caption(tmp_path, toy_world):
    module, config = load("pretrain.py", ["configs/toy.py", "mine/wrong.py"], tmp_path)
    tokenizer = Tokenizer(toy_world / "vocabulary/toy.tiktoken")
    index_shards(f"{toy_world}/pairs", tokenizer)
    shards = Shards(f"{toy_world}/pairs", tokenizer)
    pairs = Pairs(shards, tokenizer, config, Augmentation(config.crop), module.pick_caption)
    owners = {0: 1, 49: 50, 50: 50, 99: 99, 100: 101, 600: 0}  # of 601 pairs
    for sample, owner in owners.items():
        arrays = module.extra_arrays(pairs, sample, 0, None, config)
        expected = tokenizer(shards.captions(owner), 32)[0]
        assert arrays["tokens"].tolist() == expected.tolist()
