"""Recipes over defaults.

A script's settings are the fields of its `Config` dataclass. A recipe is a Python file. Its
assignments override settings, and its functions replace the script's functions of the same name
that the script lists in HOOKS. Defaults < recipes in their order < --key=value.

    python pretrain.py configs/toy.py --seed=3 --out_dir=out/toy_seed3
    python pretrain.py configs/toy.py configs/ideas/siglip.py

A recipe may compute, and may build on another (`from configs.yfcc import *`). A typed
assignment (`keep: float = 1.0`) makes a setting of its own. Names that begin with an underscore
or a capital letter, and imported modules, classes and functions, are its own business.
"""
import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import os
import sys
import types
from pathlib import Path

# OpenMP reads these when torch is loaded, so scripts import configs before torch. Threads that
# wait look 1,000 times, then sleep: to spin for longer would steal the cores of a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

ROOT = Path(__file__).resolve().parent.parent
_command_line = {}  # --key=value as text, for given()
_script = {}  # globals() of the script that runs
_replaced = {}  # {name: the script's own function} where a recipe has put another
_recipes = []  # files of the recipes on the command line
_resolved = functools.cache(os.path.realpath)  # a run has a thousand modules, and asks three times


def given(key, default):
    """The value of --key=... on the command line, else `default`; for recipes that branch."""
    if key not in _command_line:
        return default
    text = _command_line[key]
    return True if text is None else parse(text, type(default))


def original(name):
    """The script's own function, for a recipe that replaces it and still calls it."""
    if not _script:  # a loader process that was started afresh: its main is the script
        return getattr(sys.modules["__main__"], name)
    return _replaced.get(name, _script.get(name))


def replaced_functions():
    """{name: the recipe whose function stands in its place}, as a checkpoint remembers it."""
    return {name: _script[name].__module__ for name in _replaced}


def load_config(Config, script, argv=None, files=99):
    """Resolve defaults, recipes and --key=value into one Config.

    Config: dataclass of settings; its check(), if any, raises ValueError("field=...: why").
    script: globals() of the calling script; functions of recipes are put there.
    argv: list of arguments, by default the command line's.
    files: how many positional arguments the script takes at most, beside recipes.
    Returns (config, other positional arguments). Raises ValueError or FileNotFoundError.
    """
    global _script
    options, recipes, others = split_arguments(sys.argv[1:] if argv is None else argv)
    if "help" in options:
        print(f"{(script['__doc__'] or '').strip()}\n\n{inspect.getsource(Config).strip()}")
        raise SystemExit(0)
    script_name = Path(script["__file__"]).name
    if len(others) > files:
        raise ValueError(f"{others[files]}: is one argument too many for {script_name}; settings "
                         "are written --key=value (--help lists them)")
    _script.update(_replaced)  # an earlier run in this process gives its functions back
    _script = script
    _replaced.clear()
    _recipes.clear()
    _command_line.clear()
    _command_line.update(options)
    modules = [import_recipe(path) for path in recipes]
    Config = with_own_settings(Config)
    values, origin = read_settings(Config, script, dict(zip(recipes, modules)), options)
    config = Config(**values)
    try:
        if hasattr(config, "check"):
            config.check()
    except ValueError as error:  # the message starts with the field's name
        field = str(error).split("=")[0]
        raise ValueError(f"{origin.get(field, script_name)}: {error}") from None
    return config, others


def read_settings(Config, script, recipes, options):
    """({setting: value}, {setting: where it comes from}); puts recipes' functions in place."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    hooks = script.get("HOOKS", ())
    values, origin, replaced = {}, {}, {}
    for path, module in recipes.items():
        for name, value in public_names(module).items():
            if isinstance(value, types.FunctionType):
                replace_function(script, name, value, path, replaced)
            elif name in fields:
                values[name], origin[name] = value, path
            else:
                raise ValueError(unknown(path, name, [*fields, *hooks], script))
    for name, text in options.items():
        origin[name] = f"--{name}" if text is None else f"--{name}={text}"
        if name not in fields:
            raise ValueError(unknown(origin[name], name, fields, script))
        if text is None and fields[name].type is not bool:
            raise ValueError(f"--{name}: write --{name}=VALUE, without a space")
        values[name] = True if text is None else parse(text, fields[name].type)
    for name, value in values.items():
        values[name] = typed(fields[name], value, origin[name])
    return values, origin


def split_arguments(argv):
    """Arguments -> ({key: text, None for a bare --key}, recipe paths, other positionals)."""
    options, recipes, others = {}, [], []
    for argument in argv:
        if argument == "-h":
            options["help"] = None
        elif argument.startswith("-"):
            key, equals, text = argument.lstrip("-").partition("=")
            options[key] = text if equals else None
        elif argument.endswith(".py"):
            recipes.append(argument)
        else:
            others.append(argument)
    return options, recipes, others


def import_recipe(path):
    """A recipe as a module that any process can import: so its functions can be sent there."""
    if not os.path.isfile(path):
        recipes = (ROOT / "configs").rglob("[!_]*.py")
        known = [str(recipe.relative_to(ROOT)) for recipe in recipes]
        near = difflib.get_close_matches(path, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(f"{path}: no such recipe{hint}")
    file = Path(path).resolve()
    _recipes.append(file)
    inside = file.is_relative_to(ROOT)
    parts = (file.relative_to(ROOT) if inside else Path(file.name)).with_suffix("").parts
    if any("." in part for part in parts):
        raise ValueError(f"{path}: Python imports no name with a dot in it; rename it")
    name = ".".join(parts)
    if not inside and str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    module = importlib.import_module(name)
    if Path(module.__file__).resolve() != file:
        raise ValueError(f"{path}: {name} is also the name of {module.__file__}; rename it")
    return module


def recipe_modules():
    """The recipes that take part in this run, imported ones too, as modules."""
    folders = {ROOT / "configs", ROOT / "configs" / "ideas"}
    folders |= {file.parent for file in _recipes if file.parent != ROOT}
    found = []
    for module in list(sys.modules.values()):
        file = Path(_resolved(getattr(module, "__file__", None) or "none"))
        in_folder = file.parent in folders and file.name != "__init__.py"
        if in_folder or file in _recipes:
            found.append(module)
    return found


def public_names(module):
    """{name: value} of the settings and functions of a recipe; other imports are left out."""
    recipes = {recipe.__name__ for recipe in recipe_modules()}
    found = {}
    for name, value in vars(module).items():
        imported = isinstance(value, types.FunctionType) and value.__module__ not in recipes
        other = isinstance(value, (types.ModuleType, types.BuiltinFunctionType, type))
        if name[0].islower() and not imported and not other:
            found[name] = value
    return found


def with_own_settings(Config):
    """Config with a field more for each typed assignment of a recipe that it does not know."""
    known = {field.name for field in dataclasses.fields(Config)}
    new = {}
    for module in recipe_modules():
        for name, kind in getattr(module, "__annotations__", {}).items():
            if name in known or not name[0].islower():
                continue
            if kind not in (str, int, float, bool, tuple) or not hasattr(module, name):
                raise ValueError(f"{module.__file__}: {name}: write {name}: TYPE = VALUE, TYPE "
                                 "being one of str, int, float, bool, tuple")
            new[name] = (name, kind, getattr(module, name))
    if not new:
        return Config
    return dataclasses.make_dataclass(Config.__name__, new.values(), bases=(Config,))


def replace_function(script, name, function, path, replaced):
    """Put a recipe's function in the place of the script's; ValueError if it cannot be one."""
    hooks = script.get("HOOKS", ())
    if name not in hooks:
        raise ValueError(unknown(path, name, hooks, script)
                         + "; a function of the recipe's own begins with an underscore")
    if name in replaced and function is not script[name]:
        raise ValueError(f"{path}: replaces {name}, which {replaced[name]} replaces already")
    wanted = inspect.signature(original(name))
    if list(inspect.signature(function).parameters) != list(wanted.parameters):
        raise ValueError(f"{path}: {name}{inspect.signature(function)} must have the signature "
                         f"{name}{wanted}")
    _replaced.setdefault(name, script[name])
    script[name], replaced[name] = function, path


def unknown(where, name, known, script):
    """What to say of a name that is none of the `known` ones."""
    script_name = Path(script["__file__"]).name
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{where}: {script_name} has no setting or function {name}{hint} (--help lists them)"


def parse(text, kind):
    """Text of --key=value as a Python value; typed() then says whether its type is right."""
    if kind is str:
        return text
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6
    return value


def typed(field, value, where):
    """`value` as the field's type: whole numbers serve as floats, lists as tuples."""
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, str) and value.startswith("~/"):
        value = os.path.expanduser(value)
    if field.type is float and type(value) is int:
        value = float(value)
    bool_as_number = isinstance(value, bool) and field.type in (int, float)
    if bool_as_number or not isinstance(value, field.type):
        kind = getattr(field.type, "__name__", str(field.type))
        raise ValueError(f"{where}: {field.name}={value!r}: must be of type {kind}")
    return value


def check_patches(config, patch):
    """ValueError unless config.image_size is a whole number of patches, both in pixels."""
    size = config.image_size
    if size % patch:
        less = size // patch * patch
        raise ValueError(f"image_size={size}: must be a multiple of {config.model}'s patch; "
                         f"try {less} or {less + patch}")


def check_ranges(config, positive=(), not_negative=(), **choices):
    """ValueError for the first field of `config` that is outside what is named for it."""
    for name in positive:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name}={getattr(config, name)}: must be above 0")
    for name in not_negative:
        if getattr(config, name) < 0:
            raise ValueError(f"{name}={getattr(config, name)}: must be 0 or more")
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), map(str, allowed), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            words = ", ".join(map(repr, allowed))
            raise ValueError(f"{name}={value!r}: must be one of {words}{hint}")
