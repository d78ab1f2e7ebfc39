"""Writes Grafana's files: `python -m hopescale.dashboards`, in the folder of the project."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_pipeline.errors import UserError
from hopescale.dashboards.grafana import write_dashboards
from hopescale.errors import describe

FOLDER = Path("ops/grafana/dashboards")


def main(arguments: list[str] | None = None) -> int:
    """Write all dashboards and print their paths.

    Returns:
        0, or the exit code of what was wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m hopescale.dashboards", description="Write Grafana dashboards.")
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help=f"default: {FOLDER}")
    try:
        for path in write_dashboards(parser.parse_args(arguments).folder):
            print(path)
    except UserError as error:
        print(describe(error), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
