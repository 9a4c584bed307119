"""The README stays one page, and what it and docs/ name exists: links, commands, recipes, rooms."""
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
SCRIPTS = ("perceptual_init.py", "pretrain.py", "evaluate.py")


def name_of(path):
    return str(path.relative_to(ROOT))


def commands_of(text):
    """Lines of bash blocks and one-line `code` that start python or torchrun, and their parts."""
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        lines += block.splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(r"`([^`]+)`", prose)
    commands = []
    for line in lines:
        for part in line.split("&&"):
            if re.search(r"\b(python3?|torchrun)\s", part):
                commands.append(part.split("#")[0].strip())
    return commands


def anchors_of(path):
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.add(words.replace(" ", "-"))
    return anchors


# -------------------------------------------------------------------------------- one page


def test_readme_has_at_most_1300_words_and_35_table_rows():
    assert len(README.split()) <= 1300
    assert sum(line.startswith("|") for line in README.splitlines()) <= 35


def test_first_command_comes_before_150_words():
    assert len(README[:README.index("```")].split()) < 150
    assert README[README.index("```"):].startswith("```bash")


@pytest.mark.parametrize("mark", ["main-command", "test-command"])
def test_marked_command_is_one_line_directly_under_its_mark(mark):
    assert README.count(f"<!-- {mark} -->") == 1
    block = re.search(rf"^<!-- {mark} -->\n```bash\n(.*?)\n```$", README, re.S | re.M)
    assert block and "\n" not in block[1]


def test_readme_has_its_parts_in_order():
    headings = re.findall(r"^## (.*)$", README, re.M)
    assert headings == ["Quick start", "The idea", "Where things are", "Real data",
                        "Evaluate and compare", "Your own pictures, judgements, idea",
                        "What differs from the paper's group", "Speed",
                        "Trouble, limits, citation"]


def test_the_idea_is_twelve_lines():
    idea = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(idea.splitlines()) == 12
    compile(idea, "README.md", "exec")


# -------------------------------------------------------------------- what is named exists


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors_of(file), target


def test_readme_links_to_every_page_of_docs():
    for page in PAGES[1:]:
        assert f"]({name_of(page)}" in README, name_of(page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_scripts_and_modules_that_exist(page):
    for command in commands_of(page.read_text()):
        for script in re.findall(r"([\w/]+\.py)\b", command):
            if not script.startswith("mine/") and (ROOT / script).parent.is_dir():  # mine/: the reader's
                assert (ROOT / script).is_file(), command
        for module in re.findall(r"-m ((?:data|tests)[\w.]*)", command):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), command


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_give_settings_that_the_script_has(page):
    for command in commands_of(page.read_text()):
        script = re.search(r"\b(\w+\.py)\b(.*)", command)
        if script and script[1] in SCRIPTS:
            config = importlib.import_module(script[1].removesuffix(".py")).Config
            known = {field.name for field in dataclasses.fields(config)}
            given = set(re.findall(r"--(\w+)", script[2]))
            assert given <= known | {"help"}, command


def test_a_command_with_a_wrong_name_is_seen():
    """The pattern of commands_of reads both forms: a block and a line of code within a sentence."""
    text = "Say `python a.py x`.\n```bash\ncd b && torchrun --n=2 c.py  # python d.py\n```\n"
    assert commands_of(text) == ["torchrun --n=2 c.py", "python a.py x"]


def test_every_recipe_is_named():
    text = "".join(page.read_text() for page in PAGES)
    for recipe in ROOT.glob("configs/[!_]*.py"):
        assert f"`{recipe.name}`" in text, recipe.name


# --------------------------------------------------------------------------- the map of rooms


def test_map_has_every_room_with_its_length():
    counts = dict(re.findall(r"^([\w/]+\.py) +(\d+)  ", README, re.M))
    rooms = [*ROOT.glob("*.py"), ROOT / "configs/__init__.py", *ROOT.glob("data/[!_]*.py")]
    assert set(counts) == {name_of(room) for room in rooms}
    for room in rooms:
        lines = len(room.read_text().splitlines())
        assert abs(int(counts[name_of(room)]) - lines) <= 10, f"{name_of(room)} has {lines}"


def test_map_names_every_command_that_makes_data():
    named = re.search(r"^data/prepare/ +(.*)$", README, re.M)[1].split()
    commands = [path.stem for path in ROOT.glob("data/prepare/*.py")
                if '__name__ == "__main__"' in path.read_text()]
    assert sorted(named) == sorted(commands)
