"""Recipes over defaults, and the record of a run.

A script's settings are the fields of its `Config` dataclass. A recipe is a Python file whose
assignments override them; it may compute, build on another (`from configs.yfcc import *`), and
define a function with the name and signature of one of the script's functions, which it then
replaces for this run. Order: defaults < recipes as given < --key=value.

    python pretrain.py configs/toy.py --seed=3 --out_dir=out/toy_seed3
"""
import ast
import ctypes
import dataclasses
import difflib
import inspect
import os
import pathlib
import runpy
import sys
import types

# OpenMP reads these when torch is loaded, so scripts import configs first. Threads that wait for
# each other look a thousand times, about 10 us, and then sleep: at once would cost a quiet machine
# a fifth of the toy's pairs/s, never most of a busy one's. OpenMPs but GNU's know the first only.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Memory that is freed stays with the process but for blocks of 32 MB: glibc would give more of it
# back, and Linux would clear 100,000 new pages a ViT-B-32 step of 32.
if hasattr(libc := ctypes.CDLL(None), "mallopt"):
    libc.mallopt(-1, -1)        # M_TRIM_THRESHOLD: never
    libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most it takes
ROOT = pathlib.Path(__file__).resolve().parent.parent
_command_line = {}  # --key=value as text, for given()
_recipes = []       # recipe paths of this run, for write_record()


def given(key, default):
    """The value of --key=... on the command line, else `default`; for recipes that branch on it."""
    text = _command_line.get(key)
    return default if text is None else _parse(text, type(default))


def load_config(Config, script, argv=None, files=True):
    """Resolve defaults, recipes and --key=value into one Config.

    Config: dataclass of settings, optionally with check() that raises ValueError("field=...: why").
    script: globals() of the calling script; functions of recipes are put there.
    argv:   list of arguments, default sys.argv[1:].
    files:  False if the script takes no other positional arguments, such as checkpoints.
    Returns (config, other positional arguments). Raises ValueError or FileNotFoundError.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    name = pathlib.Path(script["__file__"]).name
    if "--help" in argv or "-h" in argv:
        print(_help(Config, script))
        raise SystemExit(0)
    fields = {field.name: field for field in dataclasses.fields(Config)}
    options, recipes, others = _split(argv, fields, name)
    if others and not files:
        raise ValueError(f"{others[0]}: {name} takes recipes (*.py) and --key=value only")
    _command_line.clear()
    _command_line.update(options)
    _recipes[:] = recipes
    for module in [module for module in sys.modules if module.startswith("configs.")]:
        del sys.modules[module]  # recipes that others build on read this command line, too
    values, origin = {}, {}
    for path in recipes:
        _read_recipe(path, fields, script, values, origin)
    for key, text in options.items():
        values[key], origin[key] = _parse(text, fields[key].type), f"--{key}={text}"
    for key, value in values.items():
        values[key] = _typed(fields[key], value, origin[key])
    config = Config(**values)
    if hasattr(config, "check"):
        try:
            config.check()
        except ValueError as error:  # the message starts with the field's name
            culprit = str(error).split("=")[0]
            raise ValueError(f"{origin.get(culprit, name)}: {error}") from None
    return config, others


def _split(argv, fields, name):
    """Sort arguments into --key=value options, recipe paths and other positionals."""
    options, recipes, others = {}, [], []
    for argument in argv:
        if argument.startswith("-"):
            key, equals, text = argument.lstrip("-").partition("=")
            if key not in fields:
                raise ValueError(_unknown(argument, key, fields, name))
            if not equals:
                raise ValueError(f"{argument}: write --{key}=VALUE, without a space")
            options[key] = text
        elif argument.endswith(".py"):
            if not os.path.isfile(argument):
                near = difflib.get_close_matches(argument, map(str, _known_recipes()), 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise FileNotFoundError(f"{argument}: no such recipe{hint}")
            recipes.append(argument)
        else:
            others.append(argument)
    return options, recipes, others


def _known_recipes():
    return sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("[!_]*.py"))


def _unknown(where, key, known, name):
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{where}: {name} has no setting or function {key}; {hint}(--help lists them)"


def _read_recipe(path, fields, script, values, origin):
    """Run one recipe; put its assignments into `values` and its functions into `script`."""
    name = pathlib.Path(script["__file__"]).name
    try:
        namespace = runpy.run_path(path)
    except SyntaxError as error:
        raise ValueError(f"{error.filename}:{error.lineno}: {error.msg}") from None
    except (ArithmeticError, ImportError, LookupError, NameError, TypeError) as error:
        lines = [frame.lineno for frame in inspect.getinnerframes(error.__traceback__)
                 if frame.filename == path]
        raise ValueError(f"{path}:{lines[-1] if lines else 1}: {error}") from None
    replaceable = {key: value for key, value in script.items() if key != "main"
                   and isinstance(value, types.FunctionType)
                   and value.__module__ == script["__name__"]}
    for key, value in namespace.items():
        where = _where(path, key)
        if key.startswith("_") or where is None:  # private, or merely imported from elsewhere
            continue
        if key in fields:
            values[key], origin[key] = value, where
        elif key in replaceable and isinstance(value, types.FunctionType):
            _same_signature(where, value, replaceable[key])
            script[key] = value
        else:
            raise ValueError(_unknown(where, key, [*fields, *replaceable], name))


def _where(path, name):
    """file:line where a recipe, or a recipe it builds on, binds `name`; None if it does not."""
    found = None
    for node in ast.walk(ast.parse(pathlib.Path(path).read_text(), path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            found = f"{path}:{node.lineno}"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name:
            found = f"{path}:{node.lineno}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("configs."):
            parent = ROOT / (node.module.replace(".", "/") + ".py")
            names = {alias.asname or alias.name for alias in node.names}
            if found is None and names & {"*", name}:
                found = _where(os.path.relpath(parent), name)
    return found


def _same_signature(where, new, old):
    def shape(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]
    if shape(new) != shape(old):
        raise ValueError(f"{where}: {new.__name__}{inspect.signature(new)} must have the signature "
                         f"{old.__name__}{inspect.signature(old)}")


def _parse(text, kind):
    """Text of --key=value as a Python value; words stay text unless a number or tuple is meant."""
    if kind is str:
        return text
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return int(value) if kind is int and isinstance(value, float) and value.is_integer() else value


def _typed(field, value, where):
    """`value` as the field's type: whole floats stay floats, lists become tuples; else an error."""
    if isinstance(value, list):
        value = tuple(value)
    if field.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wrong_bool = isinstance(value, bool) and field.type in (int, float)
    if wrong_bool or not isinstance(value, field.type):
        kind = getattr(field.type, "__name__", str(field.type))
        raise ValueError(f"{where}: {field.name}={value!r}: must be of type {kind}")
    return value


def _help(Config, script):
    """The script's docstring and its Config as written: fields, defaults and their comments."""
    return f"{(script['__doc__'] or '').strip()}\n\n{inspect.getsource(Config).strip()}"


# ---------------------------------------------------------------------------------- run record


def check_ranges(config, positive=(), not_negative=(), **choices):
    """ValueError for the first field of `config` that is outside what is named for it."""
    for key in positive:
        if getattr(config, key) <= 0:
            raise ValueError(f"{key}={getattr(config, key)}: must be above 0")
    for key in not_negative:
        if getattr(config, key) < 0:
            raise ValueError(f"{key}={getattr(config, key)}: must be 0 or more")
    for key, allowed in choices.items():
        if getattr(config, key) not in allowed:
            near = difflib.get_close_matches(str(getattr(config, key)), allowed, 1)
            hint = f"; did you mean {near[0]}?" if near and near[0] else ""
            raise ValueError(f"{key}={getattr(config, key)!r}: must be one of "
                             f"{', '.join(map(repr, allowed))}{hint}")


