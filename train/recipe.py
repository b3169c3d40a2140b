"""From a recipe's name and `key=value` settings to a `TrainConfig`; and what there is to be set."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm.config import flat, to_dict
from vlm.errors import ConfigError, UsageError
from vlm.train.config import SourceConfig, TrainConfig, recipe_config

RECIPES = Path(__file__).parent / "recipes"
FREE = (
    "out", "data", "save_every", "keep", "log_every", "note", "feature_cache", "trackers", "holdout_captions",
    "answers",
)  # fmt: skip
"""Keys that may differ between a run and its continuation."""
TEXTS = ("data", "out", "start", "note", "holdout_captions")
"""Keys whose value is text, whatever YAML makes of "2024" or "yes"."""


def shipped() -> dict[str, str]:
    """The recipes that ship, with the first line of what each says of itself."""
    return {
        path.stem: path.read_text("utf-8").splitlines()[0].lstrip("# ")
        for path in sorted(RECIPES.glob("*.yaml"))
    }


def recipe_path(name: str) -> Path:
    """A recipe's file: a path, or the name of one that ships.

    Raises:
        UsageError: neither.
    """
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    raise UsageError(f"{name} is no recipe: give a YAML file or one of {', '.join(shipped())}")


def read_recipe(name: str, settings: Sequence[str] = ()) -> TrainConfig:
    """A recipe with `key=value` settings applied.

    Raises:
        UsageError: no such recipe, or settings that this recipe cannot take.
        ConfigError: a recipe that is no YAML, or with an unknown key or a value of the wrong type.
    """
    import yaml

    path = recipe_path(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise ConfigError(f"{path} is not YAML: {problem}") from problem
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no keys")
    alone = copy.deepcopy(values)
    for setting in settings:
        set_key(values, setting)
    try:
        return recipe_config(values)
    except ConfigError as problem:
        recipe_config(alone)  # where the file itself is at fault, that is what is said
        raise UsageError(str(problem)) from problem


def set_key(values: dict[str, Any], setting: str) -> None:
    """Applies `a.b=value` (or `sources.0.limit=5`) to nested values; the value is read as YAML."""
    import yaml

    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise UsageError(f"{setting!r} is not of the form key=value")
    place: Any = values
    *path, last = key.split(".")
    try:
        for name in path:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        if isinstance(place, list):
            place[int(last)] = yaml.safe_load(text)
        elif isinstance(place, dict):
            place[last] = text if last in TEXTS else yaml.safe_load(text)
        else:
            raise UsageError(f"{key} cannot be set: {path[-1]} holds no keys")
    except (ValueError, IndexError, AttributeError, yaml.YAMLError) as problem:
        raise UsageError(f"{setting!r} cannot be applied: {problem}") from problem


def identity(config: TrainConfig) -> dict[str, Any]:
    """What must not change between a run and its continuation."""
    values = to_dict(config)
    for key in FREE:
        values.pop(key)
    return values


def other_keys(stored: dict[str, Any], config: TrainConfig) -> list[str]:
    """The keys in which a state's recipe is another one; those that its version did not know have defaults.

    A recipe that this version cannot read differs in what it cannot read.
    """
    try:
        one, other = _by_key(recipe_config(stored)), _by_key(config)
    except ConfigError as problem:
        return [str(problem)]
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def same_recipe(stored: dict[str, Any], config: TrainConfig) -> bool:
    """Whether a state's recipe is this one; keys that its version did not know have their defaults."""
    return not other_keys(stored, config)


def _by_key(config: TrainConfig) -> dict[str, Any]:
    """What must not change, by the keys that `key=value` sets it by."""
    values = identity(config)
    return flat(values | {"sources": dict(enumerate(values["sources"]))})


def keys(cls: type = TrainConfig, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, what it does) of everything that a recipe may say, from the fields' own texts."""
    defaults = cls()
    texts = _field_texts(cls)
    for field in dataclasses.fields(cls):
        default = getattr(defaults, field.name)
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(default):
            yield from keys(type(default), f"{name}.")
        elif field.name == "sources":
            yield from keys(SourceConfig, "sources.N.")
        else:
            shown = list(default) if isinstance(default, tuple) else default
            yield name, str(shown), texts[field.name]


def _field_texts(cls: type) -> dict[str, str]:
    """The string that follows each field in a dataclass's source."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            found = text.value if isinstance(text, ast.Expr) else None
            texts[field.target.id] = str(found.value) if isinstance(found, ast.Constant) else ""
    return texts
