"""configs/__init__.py: what a recipe may say, and the line a mistake gets."""
import dataclasses
import json
import pathlib
import subprocess
import sys
import textwrap

import pytest

import configs
from data import log

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = '''
"""A script of two settings."""
from dataclasses import dataclass
from configs import load_config
from data.log import run_main

@dataclass
class Config:
    out_dir: str = "out/x"      # where files go
    batch_size: int = 8         # pairs of a step
    lr: float = 1e-3            # peak
    keep_at: tuple = ()
    quick: bool | None = None

    def check(self):
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr}: must be above 0")

HOOKS = ("lr_at",)

def lr_at(step, config):
    return 1.0

def helper():
    return 2

def main(argv=None):
    config, others = load_config(Config, globals(), argv)
    print(config, others, lr_at(0, config))

if __name__ == "__main__":
    run_main(main)
'''


@pytest.fixture
def run(tmp_path):
    """run(recipe text or None, *arguments) -> completed process of the script above."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def start(recipe, *arguments):
        if recipe is not None:
            (tmp_path / "recipe.py").write_text(textwrap.dedent(recipe))
            arguments = ("recipe.py", *arguments)
        return subprocess.run([sys.executable, "script.py", *arguments], cwd=tmp_path, timeout=60,
                              env={"PYTHONPATH": str(ROOT), "PATH": ""},
                              capture_output=True, text=True)
    return start


@dataclasses.dataclass
class Config:
    batch_size: int = 8
    lr: float = 1e-3
    keep_at: tuple = ()
    name: str = "x"
    quick: bool | None = None


def lr_at(step, config):
    return 1.0


HOOKS = ("lr_at",)


def load(tmp_path, recipe, *arguments):
    """load_config on this module, with one recipe; functions go into a copy of its globals."""
    path = tmp_path / f"recipe_{len(list(tmp_path.iterdir()))}.py"
    path.write_text(textwrap.dedent(recipe))
    script = dict(globals())
    config, others = configs.load_config(Config, script, [str(path), *arguments])
    return config, others, script


def test_command_line_beats_recipe_beats_default(tmp_path):
    config, _, _ = load(tmp_path, "batch_size = 16\nlr = 0.5\n", "--lr=0.25")
    assert (config.batch_size, config.lr, config.name) == (16, 0.25, "x")


def test_later_recipe_beats_earlier(tmp_path):
    second = tmp_path / "second.py"
    second.write_text("lr = 3.0\n")
    assert load(tmp_path, "lr = 2.0\n", str(second))[0].lr == 3.0


def test_recipe_computes_and_keeps_private_names_and_imports_to_itself(tmp_path):
    config, _, _ = load(tmp_path, "import math\nfrom math import floor\n_gpus, GROUPS = 4, 1\n"
                                  "batch_size = _gpus * GROUPS * floor(math.pi)\n")
    assert config.batch_size == 12


def test_recipe_builds_on_another_and_reads_the_command_line(tmp_path):
    import pretrain
    config, _ = configs.load_config(pretrain.Config, vars(pretrain) | {}, [
        str(ROOT / "configs/yfcc_pi.py"), "--model=ViT-L-14"])
    assert (config.model, config.warmup_steps) == ("ViT-L-14", 10_000)
    assert config.init_vision == "out/nights_ViT-L-14/ckpt.pt"


def test_whole_numbers_serve_as_floats_and_lists_as_tuples(tmp_path):
    config, _, _ = load(tmp_path, "lr = 1\nkeep_at = [1, 2]\n", "--batch_size=1e3")
    assert (config.lr, type(config.lr), config.keep_at, config.batch_size) == (1.0, float, (1, 2),
                                                                               1000)


def test_a_function_of_the_recipe_replaces_the_scripts(tmp_path):
    _, _, script = load(tmp_path, "def lr_at(step, config):\n    return 7.0\n")
    assert script["lr_at"](0, None) == 7.0 and configs.original("lr_at")(0, None) == 1.0
    configs.load_config(Config, script, [])
    assert script["lr_at"](0, None) == 1.0  # a second run in the process starts afresh


def test_an_argument_too_many_is_named(tmp_path):
    with pytest.raises(ValueError, match="b: is one argument too many"):
        configs.load_config(Config, dict(globals()), ["a", "b"], files=1)


def test_positional_arguments_that_are_no_recipe_come_back(tmp_path):
    assert load(tmp_path, "", "out/a/ckpt.pt")[1] == ["out/a/ckpt.pt"]


@pytest.mark.parametrize("recipe, arguments, words", [
    ("lr = 1\nbatch_sise = 3\n", (), ["recipe.py", "batch_sise", "did you mean batch_size?"]),
    ("batch_size = 'many'\n", (), ["recipe.py", "batch_size='many'", "type int"]),
    ("batch_size = True\n", (), ["recipe.py", "batch_size=True", "type int"]),
    ("def lr_at(step):\n    return 1\n", (), ["recipe.py", "lr_at(step)", "lr_at(step, config)"]),
    ("def lr_add(step):\n    return 1\n", (), ["recipe.py", "lr_add", "did you mean lr_at?"]),
    ("def helper():\n    return 1\n", (), ["recipe.py", "helper", "begins with an underscore"]),
    ("lr = -1.0\n", (), ["recipe.py", "lr=-1.0", "above 0"]),
    ("keep: float = 'x'\n", (), ["recipe.py", "keep='x'", "type float"]),
    ("keep: float = 1.0\n", ("--keep=x",), ["--keep=x", "keep='x'", "type float"]),
    ("keep: float\n", (), ["recipe.py", "keep: TYPE = VALUE"]),
    ("keep: float = 1.0\n", ("--kep=2",), ["--kep", "did you mean keep?"]),
    (None, ("--bach_size=3",), ["--bach_size=3", "did you mean batch_size?"]),
    (None, ("--lr", "3"), ["--lr", "--lr=VALUE"]),
    (None, ("--lr=0",), ["--lr=0", "above 0"]),
    (None, ("nothing.py",), ["nothing.py: no such recipe"]),
])
def test_a_mistake_is_one_line_that_says_where_and_exit_2(run, recipe, arguments, words):
    done = run(recipe, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("recipe, line", [("lr = 1\nlr = sqrt(2)\n", "line 2"),
                                          ("lr = = 2\n", "invalid syntax")])
def test_a_bug_in_a_recipe_shows_python_s_own_traceback(run, recipe, line):
    done = run(recipe)
    assert done.returncode == 1 and "recipe.py" in done.stderr and line in done.stderr


def test_two_recipes_that_replace_one_function_are_named(run, tmp_path):
    (tmp_path / "second.py").write_text("def lr_at(step, config):\n    return 2.0\n")
    done = run("def lr_at(step, config):\n    return 3.0\n", "second.py")
    assert done.returncode == 2
    assert done.stderr == "script.py: second.py: replaces lr_at, which recipe.py replaces already\n"


def test_a_recipe_imports_a_function_and_a_setting_of_another(run, tmp_path):
    (tmp_path / "base.py").write_text(
        "keep: float = 1.0\ndef lr_at(step, config):\n    return 5 * config.keep\n")
    done = run("from base import *\nkeep = 3.0\n")
    assert done.stdout.endswith("[] 15.0\n"), done.stderr
    done = run("from base import *\n", "--keep=2", "base.py")  # the same function twice is one
    assert done.stdout.endswith("[] 10.0\n"), done.stderr


def test_own_settings_are_fields_of_the_config_and_of_its_record(tmp_path):
    config, _, _ = load(tmp_path, "keep: float = 1\nwords: bool = False\n", "--keep=2", "--words")
    assert dataclasses.asdict(config) | {"keep": 2.0, "words": True} == dataclasses.asdict(config)


def test_a_home_folder_is_written_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert load(tmp_path, "name = '~/runs'\n")[0].name == "/somewhere/runs"
    assert load(tmp_path, "", "--name=~/other")[0].name == "/somewhere/other"


def test_help_prints_every_field_with_its_comment(run):
    done = run(None, "--help")
    assert done.returncode == 0 and "batch_size: int = 8         # pairs of a step" in done.stdout


def test_record_keeps_config_command_recipe_and_sources(tmp_path, monkeypatch):
    config, _, _ = load(tmp_path, "from configs.toy import model as _model\nlr = 2.0\n")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "recipe.py"])
    log.write_record(tmp_path / "run", config, ROOT / "pretrain.py")
    record = tmp_path / "run/record"
    assert json.loads((record / "config.json").read_text())["lr"] == 2.0
    assert "pretrain.py recipe.py" in (record / "command.txt").read_text()
    names = {path.name for path in record.rglob("*.py")}
    assert {"recipe_0.py", "toy.py", "pretrain.py", "model.py", "pairs.py"} <= names


def test_the_record_has_a_line_for_each_start(tmp_path):
    config, _, _ = load(tmp_path, "lr = 2.0\n")
    for note in ("", "  # from step 3"):
        log.write_record(tmp_path / "run", config, ROOT / "pretrain.py", note)
    lines = (tmp_path / "run/record/command.txt").read_text().splitlines()
    assert [line.endswith("# from step 3") for line in lines] == [False, True]


def test_resume_with_another_setting_names_key_and_both_values():
    with pytest.raises(ValueError, match=r"lr was 0.1 .* is 0.2 now"):
        log.check_resume({"lr": 0.1, "workers": 1}, {"lr": 0.2, "workers": 2}, ("workers",))
    log.check_resume({"lr": 0.1, "workers": 1}, {"lr": 0.1, "workers": 2}, ("workers",))


def test_log_that_goes_on_drops_records_after_the_checkpoint(tmp_path, capsys):
    run_log = log.RunLog(tmp_path, 10)
    for step in (1, 2, 3):
        run_log.write({"step": step, "loss": 1.0})
    with open(run_log.path, "a") as file:
        file.write('{"step": 4, "lo')  # a crash cut this line
    run_log = log.RunLog(tmp_path, 10, start_step=2)
    run_log.write({"step": 3, "loss": 0.5})
    records = [json.loads(line) for line in open(run_log.path)]
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_a_change_that_is_asked_for_is_accepted_and_told():
    saved, now = {"lr": 0.1, "dtype": "bfloat16", "gone": 1}, {"lr": 0.2, "dtype": "float32"}
    changed = log.check_resume(saved, now, ("gone",), "lr,dtype")
    assert changed == {"lr": (0.1, 0.2), "dtype": ("bfloat16", "float32")}
    with pytest.raises(ValueError, match="dtype was 'bfloat16' .* accept the change by --change=dtype"):
        log.check_resume(saved, now, ("gone",), "lr")
    with pytest.raises(ValueError, match="change=lrr: lrr is no setting"):
        log.check_resume(saved, now, ("gone",), "lrr")


def test_a_setting_that_is_newer_than_the_checkpoint_is_no_reason_to_refuse():
    assert log.check_resume({"lr": 0.1}, {"lr": 0.1, "init": ""}) == {}
    with pytest.raises(ValueError, match="keep was 1.0 in the checkpoint, is None now"):
        log.check_resume({"lr": 0.1, "keep": 1.0}, {"lr": 0.1})


def test_time_left_is_unknown_until_a_step_is_made(tmp_path, capsys):
    log.RunLog(tmp_path, 10, start_step=4).write({"step": 4, "val_loss": 1.0})
    assert "eta unknown" in capsys.readouterr().out


def test_the_summary_s_rate_is_that_of_this_start(tmp_path, monkeypatch, capsys):
    """Steps 6 to 10 of 100 samples took 10 s; the first five were an earlier start's."""
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("data.log.time.time", lambda: next(clock))
    log.RunLog(tmp_path, 10, start_step=5).summary(10, 1000, "done")
    assert "; done; 0:10, 50 samples/s" in capsys.readouterr().out


def test_what_is_watched_stands_in_the_line(tmp_path, capsys):
    log.RunLog(tmp_path, 10).write({"step": 2, "zero_shot/cars": 0.25, "2afc/nights": 0.5})
    assert "zero_shot/cars 0.250  2afc/nights 0.500  eta" in capsys.readouterr().out


def test_a_reading_of_the_meter_is_of_the_time_since_the_last(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 4.0, 6.0, 7.0, 8.0, 8.0])
    monkeypatch.setattr("data.log.time.time", lambda: next(clock))
    meter, read = log.Meter(0), []
    for step in (2, 6):  # after waiting from 1 to 3, and from 6 to 7; read at 4 and 8
        with meter.waiting():
            pass
        read.append(meter.read(step))
    assert read == [(0.5, 0.5), (1.0, 0.25)]


@pytest.mark.parametrize("seconds, text", [(59.9, "0:59"), (150, "2:30"), (5400, "1:30:00")])
def test_seconds_are_shown_as_a_clock_does(seconds, text):
    assert log.clock(seconds) == text


def test_a_recipe_with_a_dot_in_its_name_is_one_line(run, tmp_path):
    (tmp_path / "lr_0.5.py").write_text("lr = 0.5\n")
    done = run(None, "lr_0.5.py")
    assert done.returncode == 2 and "lr_0.5.py: Python imports no name with a dot" in done.stderr


def test_a_bare_flag_is_given_as_true(run):
    done = run("""
        from configs import given
        fast: bool = False
        lr = 0.5 if given("fast", False) else 0.25
    """, "--fast")
    assert "lr=0.5" in done.stdout


def test_a_choice_among_numbers_is_refused_in_one_line():
    @dataclasses.dataclass
    class Config:
        first: int = 2
    with pytest.raises(ValueError, match="first=2: must be one of 0, 1$"):
        configs.check_ranges(Config(), first=(0, 1))
