"""What the commands share: settings after their arguments, and one JSON object as the last line."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hopescale.errors import ConfigError, Problem

Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of this command.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, e.g. optimizer.lr=1e-3.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


class WithSettings(TyperCommand):
    """A command whose settings may be mistaken for options: the error then says how to write them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse options that there are not.

        Raises:
            ConfigError: names all of them.
        """
        known = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        rule = "is no option of this command, and settings are written without dashes"
        problems = []
        for text, following in zip(args, [*args[1:], ""], strict=True):
            name, _, value = text.partition("=")
            if text.startswith("--") and text != "--" and name not in {*known, "--help"}:
                apart = value or ("" if following.startswith("-") or "=" in following else following)
                fix = f"write {name[2:].replace('-', '_')}={apart or 'VALUE'}"
                problems.append(Problem(name, apart or "nothing", rule, fix))
        if problems:
            raise ConfigError(problems)
        return super().parse_args(ctx, args)


def finish(result: dict[str, Any], as_json: bool) -> None:
    """Print what a command has made, where that was asked for."""
    if as_json:
        print(json.dumps(result))
