"""Whether settings fit each other and a data set: every rule between two of them stands here."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.order import quotas
from data_pipeline.schema import LEAKY_ENCODE_MODES, DataConfig, Manifest, ReaderConfig, Split


def check_use(manifest: Manifest, config: DataConfig, split: Split) -> None:
    """Check that the settings fit each other and the data set.

    Args:
        manifest: The data set.
        config: The settings.
        split: Split that will be read.

    Raises:
        DataError: All problems at once.
    """
    problems = [
        *_ignored_settings(config),
        *_view_problems(manifest, config, split),
        *_mixture_problems(manifest, config),
        *_frame_problems(manifest, config),
    ]
    mode = manifest.provenance.encode_mode
    if mode in LEAKY_ENCODE_MODES and not config.allow_leaky_features:
        rule = f"the features have encode_mode {mode}, so earlier frames may know later ones"
        fix = "encode per-frame or prefix, or set data.allow_leaky_features=true and distrust the errors"
        problems.append(Problem("data.allow_leaky_features", False, rule, fix))
    if problems:
        raise DataError(problems)


def _ignored_settings(config: DataConfig) -> Iterator[Problem]:
    """Settings that change nothing, because another one switches them off."""
    default = DataConfig()
    if config.order == "full" and config.order_shards != default.order_shards:
        fix = "set data.order=windowed, or leave it out"
        yield Problem("data.order_shards", config.order_shards, "has no effect with data.order=full", fix)
    if not config.mixture and config.mixture_block != default.mixture_block:
        fix = "set data.mixture, or leave it out"
        yield Problem("data.mixture_block", config.mixture_block, "has no effect without data.mixture", fix)
    if config.staging.folder is None and config.staging.max_bytes is not None:
        fix = "name data.staging.folder, or leave it out"
        yield Problem("data.staging.max_bytes", config.staging.max_bytes, "has no effect without a folder", fix)
    reader = config.reader
    if reader.on_bad_clip == "raise" and reader.max_bad_fraction != ReaderConfig().max_bad_fraction:
        rule = "has no effect with data.reader.on_bad_clip=raise, which allows none"
        fix = "set data.reader.on_bad_clip=substitute or mask, or leave it out"
        yield Problem("data.reader.max_bad_fraction", reader.max_bad_fraction, rule, fix)


def _view_problems(manifest: Manifest, config: DataConfig, split: Split) -> Iterator[Problem]:
    view = tuple(manifest.partitions) if config.view is None else config.view
    if not view or len(set(view)) != len(view):
        yield Problem("data.view", list(view), "must name each partition once", "remove repeats, or set null")
    for name in view:
        if name not in manifest.partitions:
            yield Problem("data.view", name, "no such partition", nearest(name, manifest.partitions))
        elif manifest.partitions[name].get(split, 0) == 0 and config.view is not None:
            rule = f"the partition has no {split} clips"
            yield Problem("data.view", name, rule, "take it out of data.view, or make such clips")
    if not any(manifest.partitions[name].get(split, 0) for name in view if name in manifest.partitions):
        fix = "shard with heldout=0.1, or name other partitions"
        yield Problem("data.view", list(view), f"none of these partitions has {split} clips", fix)


def _mixture_problems(manifest: Manifest, config: DataConfig) -> Iterator[Problem]:
    view = tuple(manifest.partitions) if config.view is None else config.view
    for number, part in enumerate(config.mixture):
        for name in part.view:
            if name not in view:
                rule = "is not among the partitions of data.view"
                yield Problem(f"data.mixture.{number}.view", name, rule, nearest(name, view))
            elif manifest.partitions.get(name, {}).get("train", 0) == 0:
                rule = "the partition has no training clips"
                yield Problem(f"data.mixture.{number}.view", name, rule, "draw from another partition")
        twins = [other for other in config.mixture if set(part.view) == set(other.view) and part.clips == other.clips]
        if len(twins) > 1 and part is twins[-1]:
            fix = f"add the weights: one part of weight {sum(twin.weight for twin in twins):g}"
            yield Problem(f"data.mixture.{number}.view", list(part.view), "another part draws from the same clips", fix)
    if config.mixture and min(quotas([part.weight for part in config.mixture], config.mixture_block)) < 1:
        weights = [part.weight for part in config.mixture]
        rule = f"leaves a part of weights {weights} without a clip in a block"
        yield Problem("data.mixture_block", config.mixture_block, rule, "raise it, or raise the smallest weight")
    if config.mixture and config.tail != "continuous":
        rule = "a mixture has no epochs that could end, for its parts are of different length"
        yield Problem("data.tail", config.tail, rule, "set data.tail=continuous")


def _frame_problems(manifest: Manifest, config: DataConfig) -> Iterator[Problem]:
    window = config.window
    longest = manifest.frames if window is None else min(window.frames, manifest.frames)
    if config.frames is not None and config.frames > longest:
        what = "the longest clip" if window is None else "a window"
        yield Problem("data.frames", config.frames, f"{what} has {longest} frames", f"use at most {longest}")
    if window is None:
        return
    if window.frames > manifest.frames:
        rule = f"the longest clip has {manifest.frames} frames"
        yield Problem("data.window.frames", window.frames, rule, f"use at most {manifest.frames}")
    if manifest.provenance.encode_mode != "per-frame":
        rule = (
            f"the features have encode_mode {manifest.provenance.encode_mode}: "
            "a window's frames would know what lies outside of it"
        )
        yield Problem("data.window", window.frames, rule, "use features encoded per-frame, or set data.window=null")
    alignment = config.action_alignment or manifest.action_alignment
    if alignment == "row1-to-row0":
        rule = f"actions aligned by {alignment} act at a clip's start alone, which most windows do not hold"
        yield Problem("data.window", window.frames, rule, "set data.action_alignment, or data.window=null")
