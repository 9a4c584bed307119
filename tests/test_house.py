"""The house: how long files may be, who may import whom, how plain statements are."""
import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = ("model.py", "perceptual_init.py", "evaluate.py", "pretrain.py")
CORE = [ROOT / "configs/__init__.py", *(ROOT / name for name in SCRIPTS),
        *(ROOT / "data").glob("*.py")]
EDGES = {"data.weights", "data.look", "data.prepare"}  # they know other people's files
SOURCES = sorted({*CORE, *ROOT.glob("data/prepare/*.py"), *ROOT.glob("configs/**/*.py")})
CODE = [path for path in SOURCES if "configs" not in path.parts or path.name == "__init__.py"]
RUNTIME = {"torch", "numpy", "PIL", "tiktoken", "regex"}  # regex comes with tiktoken, always
OPTIONAL = {"matplotlib", "pyarrow", "safetensors", "huggingface_hub", "tensorboard", "wandb"}
OURS = {"model", "evaluate", "data", "configs"}


def name_of(path):
    return str(path.relative_to(ROOT))


def line_count(path):
    return len(path.read_text().splitlines())


def imports(path, top_level_only=False):
    """Dotted names of what a file imports; `from data import log` is data and data.log."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path, top_level_only=False):
    return {name.split(".")[0] for name in imports(path, top_level_only)}


def pulled_in(path):
    """The project's files that are read when a file is imported, itself among them."""
    found, todo = set(), [path]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for name in imports(path, top_level_only=True):
            place = ROOT / name.replace(".", "/")
            todo += [file for file in (place.with_suffix(".py"), place / "__init__.py")
                     if file.is_file()]
    return found


# ---------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_a_few_hundred_lines(name):
    assert line_count(ROOT / name) <= 460


def test_the_code_does_not_grow():
    """5,900 lines are wanted; what was reached is held until someone takes more away.

    It was 7,790 before the probe, judgements during stage 2, labels of a picture, pictures of
    comparisons, mixed judgements and the loader's line; 8,030 before Ctrl-C ended a shell's list.
    """
    assert sum(map(line_count, CODE)) <= 8_040


# 3,000 are wanted of pretrain.py, 2,600 of perceptual_init.py; evaluate.py is within its 2,700.
@pytest.mark.parametrize("name, lines", [("pretrain.py", 3_175), ("evaluate.py", 2_700),
                                         ("perceptual_init.py", 2_770)])
def test_one_step_means_opening_few_lines(name, lines):
    found = pulled_in(ROOT / name)
    assert sum(map(line_count, found)) <= lines, sorted(map(name_of, found))


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_functions_fit_on_a_screen(path):
    long = [node.name for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef)
            and node.end_lineno - node.lineno + 1 > (130 if node.name == "main" else 40)]
    assert not long


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_statements_are_plain(path):
    """Comprehensions a hundred lines: a loop with names is read faster than a nest of them."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    count = sum(isinstance(node, kinds) for node in nodes)
    most = 3.5 if path.name in SCRIPTS else 6
    assert count <= max(3, most * line_count(path) / 100)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


# ---------------------------------------------------------------------------------- directions


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_packages_are_the_four_and_optional_ones_wait_inside_functions(path):
    foreign = packages(path) - set(sys.stdlib_module_names) - RUNTIME - OURS
    assert foreign <= OPTIONAL
    assert not foreign & packages(path, top_level_only=True)


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_imports_no_edge_at_the_top(path):
    if f"data.{path.stem}" in EDGES:
        return
    named = {".".join(name.split(".")[:2]) for name in imports(path, top_level_only=True)}
    assert not named & EDGES


def test_scripts_import_downwards_only():
    """model <- evaluate <- perceptual_init, pretrain; data and configs import no script."""
    allowed = {"model.py": set(), "evaluate.py": {"model"}, "perceptual_init.py": {
        "model", "evaluate"}, "pretrain.py": {"model", "evaluate"}}
    scripts = {name.removesuffix(".py") for name in SCRIPTS}
    for name, names in allowed.items():
        assert packages(ROOT / name) & scripts <= names, name
    for path in CODE:
        if path.name not in (*SCRIPTS, "export.py"):  # which writes a model for other people
            assert not packages(path) & scripts, path


def test_the_model_needs_torch_only_and_recipes_nothing_of_the_scripts():
    assert packages(ROOT / "model.py", top_level_only=True) <= set(sys.stdlib_module_names) | {
        "torch"}
    assert packages(ROOT / "configs/__init__.py") <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", ["perceptual_init", "pretrain", "evaluate"])
def test_importing_a_script_leaves_the_compiler_alone(name):
    """torch._dynamo takes as long to import as all of torch; only compiled runs need it."""
    code = f"import sys, {name}; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


# ---------------------------------------------------------------------------------- habits


def test_no_room_is_called_utils_or_helpers():
    names = {path.stem for path in SOURCES}
    assert not names & {"utils", "util", "misc", "common", "helpers", "helper"}


def test_top_level_is_flat():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    tops = {name.split("/")[0] for name in tracked.stdout.split()}
    assert tops <= {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", *SCRIPTS, "data",
                    "configs", "tests", "docs", ".ci", ".github", ".gitignore"}


def test_nothing_is_read_or_loaded_loosely():
    words = ("strict=" + "False", "weights_only=" + "False", "except " + "Exception", "except" + ":",
             "TO" + "DO", "FIX" + "ME", "arg" + "parse")
    for path in SOURCES:
        text = path.read_text()
        assert not [word for word in words if word in text], path


def test_requirements_pin_the_four_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in lines] == ["torch", "numpy", "pillow", "tiktoken"]
    assert "torch==2.13.0" in lines
