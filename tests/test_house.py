"""The house: how long files may be, who may import whom, and whether the README's map is true."""
import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = ("perceptual_init.py", "pretrain.py", "evaluate.py")
BUDGETS = {"model.py": 400, "perceptual_init.py": 280, "pretrain.py": 460, "evaluate.py": 700}
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py"), *ROOT.glob("configs/*.py")])
RUNTIME = {"torch", "numpy", "PIL", "tiktoken", "regex"}  # regex comes with tiktoken, always
OPTIONAL = {"matplotlib", "pyarrow", "safetensors", "tensorboard", "wandb"}


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(path, top_level_only=False):
    """First names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("data" if node.level else node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name, lines", BUDGETS.items())
def test_script_is_within_its_budget(name, lines):
    assert len((ROOT / name).read_text().splitlines()) <= lines


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_lines_end_by_column_100(path):
    long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not long


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_fit_on_a_screen(path):
    long = [node.name for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef)
            and node.end_lineno - node.lineno + 1 > (150 if node.name == "main" else 40)]
    assert not long


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_packages_are_the_four_and_optional_ones_wait_inside_functions(path):
    ours = {"model", "data", "configs", "evaluate"}
    foreign = imports(path) - set(sys.stdlib_module_names) - RUNTIME - ours
    assert foreign <= OPTIONAL
    assert not foreign & imports(path, top_level_only=True)


def test_scripts_do_not_import_each_other():
    scripts = {name.removesuffix(".py") for name in SCRIPTS}
    for path in SOURCES:
        trainer = path.name in ("pretrain.py", "perceptual_init.py")
        assert imports(path) & scripts <= ({"evaluate"} if trainer else set()), path


@pytest.mark.parametrize("name", ["perceptual_init", "pretrain", "evaluate"])
def test_importing_a_script_leaves_the_compiler_alone(name):
    """torch._dynamo takes as long to import as all of torch; only compiled runs need it."""
    code = f"import sys, {name}; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


def test_data_does_not_import_the_model_and_the_model_imports_torch_only():
    for path in (ROOT / "data").glob("*.py"):
        assert "model" not in imports(path), path
    stdlib = set(sys.stdlib_module_names)
    assert imports(ROOT / "model.py", top_level_only=True) - stdlib == {"torch"}


def test_no_room_is_called_utils_or_helpers():
    names = {path.stem for path in SOURCES}
    assert not names & {"utils", "util", "misc", "common", "helpers", "helper"}


def test_top_level_is_flat():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    tops = {name.split("/")[0] for name in tracked.stdout.split()}
    assert tops <= {"README.md", "LICENSE", "requirements.txt", "model.py", *SCRIPTS, "data",
                    "configs", "tests", "docs", ".ci", ".gitignore"}


def test_nothing_is_read_or_loaded_loosely():
    words = ("strict=" + "False", "weights_only=" + "False", "except " + "Exception", "except" + ":",
             "TO" + "DO", "FIX" + "ME")
    for path in SOURCES:
        text = path.read_text()
        assert not [word for word in words if word in text], path


README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""


def test_readme_maps_every_module_with_its_length():
    counts = dict(re.findall(r"^\s*([\w/]+\.py)\s+(\d+)\s", README, re.M))
    for path in SOURCES:
        if path.parent.name == "configs" and path.name != "__init__.py":
            continue  # recipes are listed by name in the table of recipes
        lines = len(path.read_text().splitlines())
        assert abs(int(counts[name_of(path)]) - lines) <= 10, f"{name_of(path)} has {lines}"


def test_readme_names_every_recipe():
    for path in (ROOT / "configs").glob("[!_]*.py"):
        assert f"`{path.name}`" in README or f"configs/{path.name}" in README, path.name


def test_readme_commands_name_files_that_exist():
    for name in set(re.findall(r"(?:python3?|torchrun[^`\n]*?) ((?:\w+/)*\w+\.py)", README)):
        assert (ROOT / name).is_file(), name
    for module in set(re.findall(r"python3? -m ((?:data|tests)[\w.]*)", README)):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


@pytest.mark.parametrize("mark", ["main-command", "test-command"])
def test_readme_command_is_one_line(mark):
    block = re.search(rf"<!-- {mark} -->\n```\w*\n(.*?)\n```", README, re.S)
    assert block and "\n" not in block[1]


def test_requirements_pin_the_four_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in lines] == ["torch", "numpy", "pillow", "tiktoken"]
    assert "torch==2.13.0" in lines
