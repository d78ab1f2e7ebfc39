"""The JSON documents that complete folders of clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError, Problem

FEATURES_FILE = "features.json"


def read_document(folder: Path, name: str, field: str, command: str) -> dict[str, Any]:
    """Return the JSON document that completes a folder of clips.

    Args:
        folder: The folder.
        name: File name of the document.
        field: Setting to name in the error.
        command: Command that makes such a folder.

    Raises:
        DataError: The folder or its document is missing, unreadable, or of another format version.
    """
    path = folder / name
    if not path.is_file():
        rule = f"the folder has no {name}, so it is not complete" if folder.is_dir() else "the folder does not exist"
        raise DataError(Problem(field, folder, rule, f"make it with `{command}`"))
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            Problem(field, path, f"not readable as JSON ({error})", f"make it again with `{command}`")
        ) from error
    version = document.get("format") if isinstance(document, dict) else None
    if version != 1:
        rule = "this release reads format 1"
        raise DataError(Problem(f"{field}.format", version, rule, f"make it again with `{command}`"))
    return document
