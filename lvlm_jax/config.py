"""Recipes on the way in: find the file, apply overrides, and turn the result into frozen dataclasses that validate.

A recipe is a Python file with ``get_config(arg="")`` that returns an ml_collections ConfigDict. Every mistake names the
field and the valid choices.
"""

import dataclasses
import difflib
import importlib.util
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

T = typing.TypeVar("T")


class ConfigError(ValueError):
    """A recipe or an override that cannot be what was meant."""


def folders() -> list[Path]:
    """Where recipes are looked for by name: inside the installed package, and beside it in a checkout."""
    package = Path(__file__).parent
    return [package / "configs", package.parent / "configs"]


def names() -> list[str]:
    """Every recipe that can be given by name."""
    return sorted({p.stem for folder in folders() if folder.is_dir() for p in folder.glob("*.py") if p.stem[0] != "_"})


def find(name: str) -> Path:
    """The file of a recipe given by name (``quickstart``) or path (``configs/quickstart.py``)."""
    if name.endswith(".py"):
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"--config={name}: no such file. Recipes by name: {', '.join(names())}")
    for folder in folders():
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    raise ConfigError(f"--config={name}: no such recipe{near(name, names())}. Recipes: {', '.join(names())}")


def load(
    name: str,
    overrides: Sequence[str] = (),
    schema: type | None = None,
    named: Mapping[str, Mapping[str, Callable[[], Any]]] | None = None,
    apart: Mapping[str, Mapping[str, str]] | None = None,
) -> Any:
    """The ConfigDict of a recipe with overrides applied.

    Args:
      name: recipe name or path, with an optional argument for its `get_config` behind a colon: ``quickstart:small``.
      overrides: ``--config.a.b=value`` words.
      schema: dataclass of the whole recipe; its defaults are filled in first, so that every field can be overridden.
      named: a section's path (``model.connector``) -> name -> what makes it. ``--config.model.connector=perceiver``
        puts that in the section's place, before the words that override its fields, wherever they stand.
      apart: a section's path -> name of what exists, but cannot be put there alone -> why.

    Raises:
      ConfigError: an unknown recipe, key or word, or a value of another type.
    """
    from absl import flags
    from ml_collections import config_flags

    check_words(overrides)
    recipe, _, arg = name.partition(":")
    config = _read(find(recipe), arg)
    overrides = _put_named(config, overrides, named or {}, apart or {})
    if schema is not None:
        fill(schema, config)
    values, words = flags.FlagValues(), ["lvlm", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True, sys_argv=words)
        values(words)
    except flags.IllegalFlagValueError as error:
        raise ConfigError(_illegal(config, str(error)) or _message(error)) from None
    except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
        raise ConfigError(f"{' '.join(overrides)}: {_message(error)}") from None
    return values.config


def _read(path: Path, arg: str) -> Any:
    """Runs a recipe file and calls its `get_config`."""
    spec = importlib.util.spec_from_file_location(f"lvlm_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no get_config(arg) that returns a ConfigDict")
    try:
        return module.get_config(arg)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _put_named(
    config: Any,
    words: Sequence[str],
    named: Mapping[str, Mapping[str, Callable[[], Any]]],
    apart: Mapping[str, Mapping[str, str]],
) -> list[str]:
    """Puts each section in that a word names whole; the other words."""
    rest = []
    for word in words:
        path, _, name = word.removeprefix("--config.").partition("=")
        if path not in named:
            rest.append(word)
            continue
        if name in apart.get(path, {}):
            raise ConfigError(f"{word}: {name} {apart[path][name]}")
        if name not in named[path]:
            part, close = path.split(".")[-1], near(name, named[path])
            raise ConfigError(f"{word}: no such {part}{close}; choose one of {', '.join(named[path])}")
        *parents, last = path.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        if last in node:
            del node[last]
        node[last] = named[path][name]()
    return rest


def _illegal(config: Any, text: str) -> str:
    """What an override with a value of another type should have been; "" where the field is not found."""
    path, equals, rest = text.removeprefix("flag --").partition("=")
    *parts, last = path.split(".")[1:]
    try:
        for part in parts:
            config = config[part]
        kind, now = config.get_type(last).__name__, config[last]
    except (AttributeError, KeyError, TypeError, ValueError):
        return ""
    example = "" if now is None else f", as in --{path}={now}"
    return f"--{path}{equals}{rest.partition(': ')[0]}: expected {kind}{example}"


def _message(error: Exception) -> str:
    """The last thing an ml_collections error says, on one line, without its quotes and its chain of causes."""
    text = str(error.args[0] if error.args else error).replace("\\n", "\n").replace("\\'", "'")
    lines = [line.strip(" \"'") for line in text.splitlines()]
    guessed = len(lines) > 1 and lines[1].startswith("Did you mean")
    if guessed or (isinstance(error, KeyError | AttributeError) and lines[0].isidentifier()):
        lines[0] = f"no such field {lines[0]!r}"
    return "; ".join(lines)


def fill(hint: Any, config: Any) -> None:
    """Adds every default of a dataclass (and of those inside it) that a ConfigDict leaves out.

    A dataclass whose further defaults depend on its values has a static method ``fill`` that adds those.
    """
    if typing.get_origin(hint) is dict:
        for item in config.values():
            fill(typing.get_args(hint)[1], item)
        return
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = _chosen(typing.get_args(hint), config)
    if not dataclasses.is_dataclass(hint) or not hasattr(config, "keys"):
        return
    hints = typing.get_type_hints(hint)
    for field in dataclasses.fields(hint):
        if field.name in config:
            if config[field.name] is not None:
                fill(hints[field.name], config[field.name])
        elif field.default is not dataclasses.MISSING:
            config[field.name] = _entry(field.default, hints[field.name])
        elif field.default_factory is not dataclasses.MISSING:
            config[field.name] = _entry(field.default_factory(), hints[field.name])
    getattr(hint, "fill", lambda config: None)(config)


def _chosen(options: Sequence[Any], values: Any) -> Any:
    """Of the dataclasses among a union's types the one that knows most of a mapping's keys, the first of equals."""
    classes = [option for option in options if dataclasses.is_dataclass(option)]
    if len(classes) < 2 or not hasattr(values, "keys"):
        return classes[0] if classes else None
    return max(classes, key=lambda cls: len({field.name for field in dataclasses.fields(cls)} & set(values.keys())))


def _entry(value: Any, hint: Any) -> Any:
    """A value as a ConfigDict holds it: None becomes a typed placeholder, since a plain None cannot be overridden."""
    from ml_collections import config_dict

    if value is None:
        kinds = [a for a in typing.get_args(hint) if a in (int, float, str, bool)]
        return config_dict.placeholder(kinds[0] if kinds else object)
    return to_config(value) if dataclasses.is_dataclass(value) else value


def check_words(words: Sequence[str]) -> None:
    """Every word must be an override; ``config.lr=1`` without its dashes would be ignored in silence."""
    for word in words:
        if word.startswith("--config."):
            if "=" not in word:
                raise ConfigError(f"{word}: write the value behind an equals sign, {word}=VALUE")
            continue
        bare = word.lstrip("-")
        if bare.startswith(("config.", "model.", "stages.", "data.", "mesh=", "seed=")):
            fix = bare if bare.startswith("config.") else f"config.{bare}"
            raise ConfigError(f"{word}: overrides begin with two dashes and 'config.': did you mean --{fix}?")
        raise ConfigError(f"{word}: not understood; overrides look like --config.seed=1")


def build(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """A dataclass from a nested mapping, field by field, nested dataclasses too.

    Raises:
      ConfigError: an unknown key, a missing one, a value of the wrong type, or what the dataclass itself refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    if unknown := sorted(set(values) - set(fields)):
        name = unknown[0]
        raise ConfigError(f"{where}.{name}: no such field{near(name, fields)}. Fields: {', '.join(fields)}")
    out = {}
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name in values and not (needed and values[name] is None and type(None) not in typing.get_args(hints[name])):
            out[name] = convert(hints[name], values[name], f"{where}.{name}")
        elif needed:
            raise ConfigError(f"{where}.{name}: this field has no default and must be given")
    try:
        return cls(**out)
    except ValueError as error:
        if isinstance(error, ConfigError) and str(error).startswith("config."):
            raise  # a part built within has named its place
        raise ConfigError(f"{where}: {error}") from error


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` says: dataclasses from mappings, tuples from lists, int to float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        if isinstance(value, Mapping) and (cls := _chosen(args, value)) is not None:
            return convert(cls, value, where)
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return convert(option, value, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0] if len(errors) == 1 else ConfigError(f"{where}={value!r}: expected {_name(hint)}")
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where}={value!r}{near(str(value), map(str, args))}: choose one of {list(args)}")
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r}: expected the fields of {hint.__name__}")
        return build(hint, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r}: expected a mapping")
        return {key: convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple:
        return _tuple(args, value, where)
    return _plain(hint, value, where)


def _tuple(args: tuple, value: Any, where: str) -> tuple:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{where}={value!r}: expected a tuple, ({value!r},)")
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise ConfigError(f"{where}={value!r}: expected {len(args)} values")
    return tuple(convert(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(args, value)))


def _plain(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ConfigError(f"{where}={value!r}: expected {_name(hint)}, got {type(value).__name__}")
    return value


def to_dict(value: Any) -> Any:
    """A dataclass tree as plain dicts, lists and scalars: what is written beside a run."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return value


def unequal(was: Any, now: Any, skip: Collection[str] = (), where: str = "") -> list[tuple[str, Any, Any]]:
    """Where two trees of dicts differ: (path, value there, value here), keys in `skip` left out at every depth."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted((was.keys() | now.keys()) - set(skip))
        found = (unequal(was.get(k), now.get(k), skip, f"{where}.{k}" if where else k) for k in keys)
        return [line for lines in found for line in lines]
    return [] if was == now else [(where, was, now)]


def to_config(value: Any) -> Any:
    """A dataclass tree as a ConfigDict to start a recipe from."""
    import ml_collections

    hints = typing.get_type_hints(type(value))
    fields = {f.name: _entry(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(value) if f.init}
    return ml_collections.ConfigDict(fields)


def open_fields(cls: type) -> Any:
    """A dataclass's defaults as a ConfigDict; a field without one is a placeholder, to be overridden."""
    import ml_collections
    from ml_collections import config_dict

    hints, out = typing.get_type_hints(cls), ml_collections.ConfigDict()
    for field in dataclasses.fields(cls):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        value = None if needed else getattr(field, "default", None)
        if not needed and field.default is dataclasses.MISSING:
            value = field.default_factory()
        out[field.name] = config_dict.placeholder(hints[field.name]) if needed else _entry(value, hints[field.name])
    return out


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def near(name: str, choices: Any) -> str:
    """The choice that a name is closest to, as a question in brackets; nothing where none is close."""
    found = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
