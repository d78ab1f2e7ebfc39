"""Composes YAML files and overrides with Hydra, then hands over to the typed schema; OmegaConf ends here.

Overrides are Hydra's: `experiment=demo optimizer=adamw optimizer.lr=3e-4`. A key without a dot that names a folder
of `configs/` picks a file; everything else sets a value. All mistakes are reported at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from hopescale.errors import ConfigError, Problem

from .checks import cross_section_problems
from .schema import Config

PACKAGE = Path(__file__).resolve().parent.parent


def configs_folder() -> Path:
    """The YAML files: inside the installed package, or beside it in a checkout."""
    installed = PACKAGE / "_configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def load_config(overrides: Sequence[str]) -> Config:
    """Compose and validate.

    Args:
        overrides: `group=file` and `section.field=value`, as typed.

    Raises:
        ConfigError: every override that cannot be parsed, or every field that breaks its rule.
    """
    parsed, problems = _parse(overrides)
    groups = _groups()
    picks, unknown = _check_picks([o for o in parsed if o.key_or_group in groups], groups)
    values = [o for o in parsed if o.key_or_group not in groups]
    problems += unknown
    with initialize_config_dir(str(configs_folder()), version_base="1.3"):
        try:
            composed = compose("config", [str(o.input_line) for o in picks])
        except HydraException as error:
            raise ConfigError(
                Problem(
                    "configs", configs_folder(), f"could not be composed ({error})", "repair the YAML file it names"
                )
            ) from error
    problems += _bare_words(composed)
    tree, misplaced = _with_values(composed, values)
    problems += misplaced
    try:
        config = validate(tree)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return config


def validate(tree: Any) -> Config:
    """Check a plain tree against the schema, turning every violation into a `Problem`.

    Raises:
        ConfigError: all violations.
    """
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        errors = [dict(e) for e in error.errors()]
        raise ConfigError([p for e in errors if not _follows(e, errors) for p in _problems(tree, e)]) from None
    problems = list(cross_section_problems(config))
    if problems:
        raise ConfigError(problems)
    return config


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The same configuration with some values set anew.

    Raises:
        ConfigError: an override that cannot be parsed or names a file, or a field that breaks its rule.
    """
    parsed, problems = _parse(overrides)
    problems += [
        Problem(o.key_or_group, o.value(), "a finished configuration takes values only", "write section.field=value")
        for o in parsed
        if o.key_or_group in _groups()
    ]
    tree, misplaced = _with_values(OmegaConf.create(to_tree(config)), parsed)
    if problems or misplaced:
        raise ConfigError([*problems, *misplaced])
    return validate(tree)


def to_tree(config: Config) -> dict[str, Any]:
    """The configuration as plain YAML and JSON values."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; `validate` takes it back."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        try:
            override = parser.parse_override(text)
            if override.type is None or override.is_delete() or override.is_sweep_override():
                raise ValueError("deletions and sweeps are not supported")
            parsed.append(override)
        except (HydraException, ValueError) as error:
            reason = str(error).splitlines()[0]
            dotted = re.sub(r"\[(\d+)\]", r".\1", text.partition("=")[0])
            fix = f"write {dotted}=..." if dotted != text.partition("=")[0] else "write section.field=value"
            problems.append(Problem("override", text, f"must be key=value ({reason})", fix))
    return parsed, problems


def _with_values(tree: DictConfig, values: Sequence[Override]) -> tuple[Any, list[Problem]]:
    """Set the values, with a problem for each that has no place, and leave OmegaConf; references must lead on."""
    OmegaConf.set_struct(tree, False)
    problems = []
    for override in values:
        try:
            OmegaConf.update(tree, _field_meant(override), override.value(), merge=True, force_add=True)
        except (OmegaConfBaseException, TypeError) as error:
            rule = f"names an entry that its list does not have ({str(error).splitlines()[0]})"
            fix = "count entries from 0, or write the whole list"
            problems.append(Problem(override.key_or_group, override.value(), rule, fix))
    try:
        return OmegaConf.to_container(tree, resolve=True), problems
    except OmegaConfBaseException as error:
        field = getattr(error, "full_key", None) or "configuration"
        rule = f"refers to something that is not there ({str(error).splitlines()[0]})"
        raise ConfigError(Problem(field, "${...}", rule, f"write the value of {field} itself")) from None


def _field_meant(override: Override) -> str:
    """Where a value goes: a word for a section that has a short form is for that field, and leaves the others alone."""
    key = override.key_or_group
    short = _short_form(key.split("."))
    return f"{key}.{short}" if short is not None and isinstance(override.value(), str) else key


def _short_form(path: list[str]) -> str | None:
    return getattr(_section_at(path), "SHORT_FORM", None)


def _bare_words(tree: DictConfig) -> Iterator[Problem]:
    """Short forms in files: laid over another file, one would undo whatever else that one says of the section."""
    for path in map(list, _all_fields(Config)):
        short, field = _short_form(path), ".".join(path)
        word = None if short is None else OmegaConf.select(tree, field)
        if isinstance(word, str):
            yield Problem(field, word, "is a section, whose short form no file may use", f"write {{{short}: {word}}}")


def _groups() -> dict[str, list[str]]:
    return {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in configs_folder().iterdir() if p.is_dir()}


def _check_picks(picks: Sequence[Override], groups: dict[str, list[str]]) -> tuple[list[Override], list[Problem]]:
    """Picks of files that exist, and a problem for each of the others."""
    problems = [
        Problem(
            o.key_or_group,
            o.value(),
            f"must be one of {', '.join(groups[o.key_or_group])}",
            _nearest_fix(str(o.value()), groups[o.key_or_group]),
        )
        for o in picks
        if o.value() not in groups[o.key_or_group]
    ]
    return [o for o in picks if o.value() in groups[o.key_or_group]], problems


def _problems(tree: Any, error: dict[str, Any]) -> list[Problem]:
    """One pydantic error in our four parts; rules between the fields of a section come as a list."""
    path = [str(part) for part in error["loc"]]
    field = ".".join(path) or "configuration"
    if error["type"] == "rules":
        rules = error["ctx"]["problems"]
        return [Problem(f"{field}.{name}", value, rule, fix) for name, value, rule, fix in rules]
    if error["type"] == "extra_forbidden":
        known = list(_fields_at(path[:-1]))
        everywhere = [".".join(p) for p in _all_fields(Config)]
        near = [name for name in everywhere if name.split(".")[1:] == path]
        near += [".".join([*path[:-1], name]) for name in difflib.get_close_matches(path[-1], known, n=1)]
        # Elsewhere, but not the sections the field is in.
        near += [name for name in difflib.get_close_matches(field, everywhere, n=1) if not field.startswith(name)]
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}" if known else "remove it"
        return [Problem(field, error["input"], "is not a field of the configuration", fix)]
    rule = error["msg"].removeprefix("Value error, ")
    section = isinstance(error["input"], dict | BaseModel)
    between_fields = section and error["type"] == "value_error"
    value = None if error["type"] == "missing" else error["input"]
    value = _named_in(rule, _value_at(tree, path)) if between_fields else value
    fix = "change one of the fields it names" if between_fields else f"set {_wanted(path, error)}"
    return [Problem(field, value, _sentence(rule), fix)]


def _follows(error: dict[str, Any], errors: Sequence[dict[str, Any]]) -> bool:
    """Whether a list is only too short because entries of it are wrong, which other errors say."""
    place = error["loc"]
    inside = (other["loc"] for other in errors if other is not error)
    return error["type"] == "too_short" and any(loc[: len(place)] == place for loc in inside)


WANTED = {
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text, in quotes if it looks like a number",
    "tuple_type": "a list, like [a,b]",
    "too_short": "a list of at least {min_length}",
    "literal_error": "{expected}",
    "missing": "a value, for it has no default",
}
"""Kind of pydantic error -> what would fit; a field without is one whose rule says it."""


def _wanted(path: list[str], error: dict[str, Any]) -> str:
    """The field, and what to set it to."""
    field = ".".join(path)
    if first := next(iter(_fields_at(path)), None):
        return f"its fields, like {field}.{first}"
    bounds = {name: f"{bound:g}" if isinstance(bound, float) else bound for name, bound in error.get("ctx", {}).items()}
    return f"{field} to " + WANTED.get(error["type"], "what fits this rule").format(**bounds)


def _sentence(rule: str) -> str:
    return rule[0].lower() + rule[1:] if rule else rule


def _value_at(tree: Any, path: list[str]) -> Any:
    for part in path:
        tree = tree.get(part) if isinstance(tree, dict) else tree
    return tree


def _named_in(rule: str, section: Any) -> Any:
    """The fields of a section that a rule speaks of."""
    given = section.items() if isinstance(section, dict) else ()
    return {name: value for name, value in given if re.search(rf"\b{re.escape(name)}\b", rule)} or "the section"


def _fields_at(path: list[str]) -> Iterator[str]:
    yield from getattr(_section_at(path), "model_fields", {})


def _section_at(path: list[str]) -> Any:
    """The schema of a section, or of what a list holds; anything else of a field that is no section."""
    model: Any = Config
    for part in path:
        if part.isdigit():
            model = next(iter(get_args(model)), None)
        else:
            info = getattr(model, "model_fields", {}).get(part)
            model = info.annotation if info is not None else None
            if isinstance(model, UnionType):  # an optional section
                model = next((kind for kind in get_args(model) if hasattr(kind, "model_fields")), None)
    return model


def _all_fields(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, info in model.model_fields.items():
        yield (*prefix, name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _all_fields(info.annotation, (*prefix, name))


def _nearest_fix(given: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, valid, n=1)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(valid)}"
