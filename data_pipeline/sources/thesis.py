"""The tree of the masterthesis training pipeline: one folder a clip, features and actions in folders of their own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.sources.base import SourceClip, SourceProvenance
from data_pipeline.sources.clip_source import ClipSource, ExtrinsicsRows, FoundClip
from data_pipeline.sources.labels import natural
from data_pipeline.sources.stored import NpyArray, StoredArray

FEATURES_FOLDER = "feature_maps"
OTHERS_FOLDER = "actions_states"
DEFAULT_TOKENS = 256


@dataclass(kw_only=True)
class ThesisTree(ClipSource):
    """Clips as `clip_NNNNN/feature_maps/NAME.npy` and `clip_NNNNN/actions_states/actions.npy`.

    Beside actions.npy there may be states.npy and extrinsics.npy, of which the first F - 1 rows count. Features
    `[F * N, E]` have 256 tokens a frame where `tokens` says nothing else, and are refused if 576 would fit too or the
    other files have rows of another number of frames. Of the actions, row 1 acts between frames 0 and 1 and nothing
    acts later, as that pipeline trains.

    Attributes:
        features: File name inside feature_maps; None takes the only .npy there.
    """

    provenance: SourceProvenance = field(default_factory=lambda: SourceProvenance(action_alignment="row1-to-row0"))
    extrinsics_rows: ExtrinsicsRows = "first"
    features: str | None = None

    kind = "thesis"
    flat_tokens = DEFAULT_TOKENS

    def found(self) -> Iterable[FoundClip]:
        """See `ClipSource`."""
        with os.scandir(self.path) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and is_clip_folder(Path(entry.path))]
        for name in sorted(names, key=natural):
            arrays, problem = self._arrays(name)
            yield FoundClip(name, name, arrays, problem=problem)

    def again(self, clip: SourceClip) -> Mapping[str, StoredArray]:
        """See `ClipSource`."""
        arrays, problem = self._arrays(clip.where)
        if problem:
            raise self._unreadable(clip, problem)
        return arrays

    def _arrays(self, name: str) -> tuple[dict[str, StoredArray], str]:
        feature, problem = self._feature_name(name)
        if problem:
            return {}, problem
        arrays: dict[str, StoredArray] = {"features": self._array(name, FEATURES_FOLDER, feature)}
        for kind in ("actions", "states", "extrinsics"):
            if kind == "actions" or os.path.lexists(self.path / name / OTHERS_FOLDER / f"{kind}.npy"):
                arrays[kind] = self._array(name, OTHERS_FOLDER, f"{kind}.npy")
        return arrays, ""

    def _feature_name(self, name: str) -> tuple[str, str]:
        folder = self.path / name / FEATURES_FOLDER
        try:
            names = sorted(entry for entry in os.listdir(folder) if entry.endswith(".npy"))
        except OSError as error:
            return "", f"{name}/{FEATURES_FOLDER}: the folder cannot be read ({error.strerror})"
        if self.features is not None:
            if self.features in names:
                return self.features, ""
            there = ", ".join(names) or "no .npy at all"
            return "", f"{name}/{FEATURES_FOLDER}: it has no {self.features}, only {there}"
        if len(names) != 1:
            holds = f"it holds {', '.join(names)}; name one with the option features" if names else "it holds no .npy"
            return "", f"{name}/{FEATURES_FOLDER}: {holds}"
        return names[0], ""

    def _array(self, clip: str, folder: str, name: str) -> NpyArray:
        return NpyArray(self.path / clip / folder / name, f"{clip}/{folder}/{name}")


def is_clip_folder(folder: Path) -> bool:
    """Return whether a folder is one of a clip: by its name, or by what is inside."""
    return folder.name.startswith("clip_") or (folder / FEATURES_FOLDER).is_dir()
