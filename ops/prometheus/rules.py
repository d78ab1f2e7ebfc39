"""Writes `rules/*.yml` from `templates/*.yml` and the numbers of `settings.yml`.

    python ops/prometheus/rules.py                                   # after a change of a template or a number
    python ops/prometheus/rules.py --settings MINE.yml --output DIR  # the same rules with other numbers
    python ops/prometheus/rules.py --check                           # exit code 1 where rules/ is out of date

In a template `<<name>>` is a setting, `<<name.seconds>>` one that is a length of time, in seconds.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
TEMPLATES = HERE / "templates"
HEADER = "# Written by ops/prometheus/rules.py from templates/{name} and settings.yml: change those.\n"

Settings = Mapping[str, str | int | float]

_PLACE = re.compile(r"<<([\w.]+)>>")
_LENGTH = re.compile(r"(?:\d+(?:ms|[smhdwy]))+")
_PART = re.compile(r"(\d+)(ms|[smhdwy])")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}


class BadSettings(ValueError):
    """Settings that the templates cannot be filled with; the message says which and why."""


def in_seconds(name: str, value: object) -> str:
    """A length of time such as `1h30m` in seconds, as PromQL writes numbers.

    Args:
        name: of the setting, for the message.
        value: of the setting.

    Raises:
        BadSettings: the value is no length of time.
    """
    if not isinstance(value, str) or not _LENGTH.fullmatch(value):
        raise BadSettings(f"{name}={value!r} must be a length of time: give it a unit, such as 90s, 15m or 6h")
    return f"{sum(int(number) * _SECONDS[unit] for number, unit in _PART.findall(value)):g}"


def read_settings(path: Path) -> Settings:
    """The numbers of a file like `settings.yml`.

    Raises:
        BadSettings: the file holds something else.
    """
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise BadSettings(f"{path} must hold lines of the form `name: value`")
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise BadSettings(f"{path}: {name}={value!r} must be a number, a length of time or a text")
    return settings


def render(settings: Settings) -> dict[str, str]:
    """The rules with these numbers, by file name.

    Raises:
        BadSettings: a setting is missing, is none that a template asks for, or is no length of time and has to be one.
    """
    templates = {path.name: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.yml"))}
    asked = {place.removesuffix(".seconds") for text in templates.values() for place in _PLACE.findall(text)}
    if missing := sorted(asked - settings.keys()):
        raise BadSettings(f"the templates ask for settings that are not given: {', '.join(missing)}")
    if unknown := sorted(settings.keys() - asked):
        raise BadSettings(f"no template asks for {', '.join(unknown)}; they ask for {', '.join(sorted(asked))}")

    def fill(place: re.Match[str]) -> str:
        name = place[1].removesuffix(".seconds")
        return str(settings[name]) if name == place[1] else in_seconds(name, settings[name])

    return {name: HEADER.format(name=name) + _PLACE.sub(fill, text) for name, text in templates.items()}


def write(rules: Mapping[str, str], folder: Path) -> None:
    """Write rules into a folder, where other files stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in rules.items():
        (folder / name).write_text(text, encoding="utf-8")


def out_of_date(rules: Mapping[str, str], folder: Path) -> list[str]:
    """Names of rules that a folder does not hold, or not like this."""
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.yml")}
    return [name for name, text in rules.items() if there.get(name) != text]


def main(arguments: list[str] | None = None) -> int:
    """Write or check the rules.

    Returns:
        0; 1 where `--check` finds a difference; 2 for settings that do not fit the templates.
    """
    parser = argparse.ArgumentParser(prog="rules.py", description="Writes the rules of Prometheus.")
    parser.add_argument("--settings", type=Path, default=HERE / "settings.yml", metavar="FILE")
    parser.add_argument("--output", type=Path, default=HERE / "rules", metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    try:
        rules = render(read_settings(options.settings))
    except BadSettings as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not options.check:
        write(rules, options.output)
        return 0
    old = out_of_date(rules, options.output)
    if old:
        print(f"{options.output}: {', '.join(old)}: out of date, run python ops/prometheus/rules.py", file=sys.stderr)
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
