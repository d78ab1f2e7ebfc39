"""`hopescale data shard` and `hopescale data merge`: settings of a command line onto the sharder, and what it says."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from data_pipeline.schema import Manifest
from data_pipeline.shard.journal import REPORT_FILE
from data_pipeline.shard.merge import merge
from data_pipeline.shard.plan import Plan, ShardSettings, Work, payload_bytes
from data_pipeline.shard.run import WHOLE, OpenedClips, RunSettings, open_clips, plan_shards, shard_part
from data_pipeline.sources.base import SourceProvenance
from data_pipeline.sources.thesis import ThesisTree
from data_pipeline.stats import SharderStats
from hopescale.data_commands import Bar, byte_text, parse_settings, with_rules
from hopescale.errors import ConfigError, Problem
from hopescale.metrics.sinks.prometheus import write_textfile

_SECONDS_BETWEEN_LINES = 10.0
_SHOWN = 10
_SHARD = {field.name: field.default for field in fields(ShardSettings)}
_RUN = {field.name: field.default for field in fields(RunSettings)}
_SOURCE: dict[str, Any] = {"kind": str, "partitions": (), "split": str}
_OTHER: dict[str, Any] = {"part": WHOLE, "dry_run": False, "metrics_file": str}
_NOT_DRY = ("part", "workers", "paranoid", "metrics_file")
_PREFIXES = ("source.", "provenance.")


def shard_clips(source: str, out: Path, settings: Sequence[str], bar: Bar) -> dict[str, Any]:
    """Write the clips of a source, or a part of them, to `out`; with dry_run, only say what would be written.

    Raises:
        UserError: unknown settings, or what the sharder refuses.
    """
    values, prefixed = _values(settings)
    made = ShardSettings(**{name: values[name] for name in _SHARD if name in values})
    how = RunSettings(**{name: values[name] for name in _RUN if name in values})
    given = {name: values[name] for name in _SOURCE if name in values}
    clips = open_clips(source, options=prefixed["source."], provenance=prefixed["provenance."], **given)
    alignment_given = "action_alignment" in prefixed["provenance."]
    if values.get("dry_run", False):
        _check_dry_run(values)
        return _dry_run(clips, out, made, how, alignment_given)
    watch = _Watch(bar, _metrics_file(values.get("metrics_file")))
    part = values.get("part", WHOLE)
    manifest = shard_part(
        clips,
        out,
        made,
        how,
        part,
        planned=lambda plan: _advise(plan, alignment_given),
        progress=watch.clip_done,
        report=watch.shard_done,
    )
    watch.say(last=True)
    if manifest is None:
        print(f"part {part} is done; `hopescale data merge {out}` completes the data set when all parts are")
        return {"out": str(out), "clips": watch.stats.clips + watch.stats.skipped, "part": part, **asdict(watch.stats)}
    return _described(out, manifest) | {"statistics": asdict(watch.stats)}


def merge_shards(out: Path) -> dict[str, Any]:
    """Complete a data set whose parts are all written.

    Raises:
        UserError: what `merge` refuses.
    """
    return _described(out, merge(out))


def _values(settings: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Settings of this command, and those of the source and its provenance by their prefix."""
    prefixed: dict[str, dict[str, str]] = {prefix: {} for prefix in _PREFIXES}
    own, problems = [], []
    for text in settings:
        name, equals, raw = text.partition("=")
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None or not equals:
            own.append(text)
        elif name.removeprefix(prefix) in prefixed[prefix]:
            problems.append(Problem(name, raw, "is given twice", "give it once"))
        else:
            prefixed[prefix][name.removeprefix(prefix)] = raw
    known = {field.name for field in fields(SourceProvenance)}
    for text in own:
        name = text.partition("=")[0]
        if name in known:
            problems.append(Problem(name, text, "is not a setting of this command", f"write provenance.{text}"))
    if problems:
        raise ConfigError(problems)
    valid = {**_SHARD, **_RUN, **_SOURCE, **_OTHER}
    return parse_settings(with_rules(own), valid), prefixed


def _metrics_file(name: str | None) -> Path | None:
    """Where Prometheus' node_exporter finds the sharder's figures, if it shall.

    Raises:
        ConfigError: a name the exporter would pass over, or a folder that is not there.
    """
    if name is None:
        return None
    path = Path(name)
    if path.suffix != ".prom" or not path.parent.is_dir():
        rule = "must end in .prom and lie in an existing folder, as node_exporter's textfile collector wants it"
        raise ConfigError(Problem("metrics_file", name, rule, "name a file such as /var/lib/node_exporter/shard.prom"))
    return path


def _check_dry_run(values: dict[str, Any]) -> None:
    """Refuse what a dry run has no use for.

    Raises:
        ConfigError: names all such settings.
    """
    unused = [name for name in _NOT_DRY if name in values]
    if unused:
        rule, fix = "has no effect with dry_run=true: the plan of all shards is shown", "leave it out"
        raise ConfigError([Problem(name, values[name], rule, fix) for name in unused])


def _dry_run(
    clips: OpenedClips, out: Path, settings: ShardSettings, how: RunSettings, alignment_given: bool
) -> dict[str, Any]:
    plan, work = plan_shards(clips, settings, how)
    result = _planned(out, plan, work)
    if plan.bad:
        print(f"{len(plan.bad)} clips would be left out")
    for clip in plan.bad[:_SHOWN]:
        print(f"  {clip.key}: {clip.reason}")
    print(
        f"{plan.num_clips} clips of up to {plan.frames} frames, {len(plan.shards)} shards, {byte_text(result['bytes'])}"
    )
    for name, planned in plan.fields.items():
        kept = planned.source == planned.stored
        source = "" if kept else f" from {planned.source}" if planned.source else ", one a channel and clip"
        print(f"  {name}: {planned.stored} [..., {', '.join(map(str, planned.shape))}]{source}")
    for name, counts in result["partitions"].items():
        print(f"  partition {name}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    print(f"statistics over {'all' if plan.sample_every == 1 else f'one of {plan.sample_every}'} training tokens")
    _advise(plan, alignment_given)
    print("nothing was written")
    return result


def _advise(plan: Plan, alignment_given: bool) -> None:
    """Name what was assumed because nobody said it, where a wrong assumption would spoil the training."""
    if plan.source.kind == ThesisTree.kind and plan.action_alignment == "row1-to-row0" and not alignment_given:
        print(
            "action_alignment=row1-to-row0, as the pipeline of such trees trains: row 1 of a clip's actions acts "
            "between its frames 0 and 1, and no other row is used; provenance.action_alignment names other rules",
            file=sys.stderr,
        )
    if plan.provenance.encode_mode == "unknown":
        print(
            "encode_mode=unknown: training refuses such features, unless data.allow_leaky_features=true; say which "
            "frames they were encoded from with provenance.encode_mode=per-frame, prefix or clip",
            file=sys.stderr,
        )


def _planned(out: Path, plan: Plan, work: Work) -> dict[str, Any]:
    clips = [each.clip for some in work for each in some]
    partitions: dict[str, dict[str, int]] = {name: {"train": 0, "heldout": 0} for name in plan.partitions}
    for clip in clips:
        partitions[clip.partition][clip.split or "train"] += 1
    return {
        "out": str(out),
        "dry_run": True,
        "clips": plan.num_clips,
        "bad": [asdict(clip) for clip in plan.bad],
        "bytes": payload_bytes(plan, clips),
        "shards": [asdict(shard) for shard in plan.shards],
        "fields": {name: asdict(planned) for name, planned in plan.fields.items()},
        "partitions": partitions,
        "settings": asdict(plan.settings),
        "provenance": asdict(plan.provenance),
    }


def _described(out: Path, manifest: Manifest) -> dict[str, Any]:
    written = out / REPORT_FILE
    # Tars that were indexed where they lie have none.
    report = json.loads(written.read_text(encoding="utf-8")) if written.exists() else {"notes": [], "skipped": []}
    for note in report["notes"]:
        print(note)
    skipped = report["skipped"]
    if skipped:
        print(f"{len(skipped)} clips were left out; {out / REPORT_FILE} lists all")
    for clip in skipped[:_SHOWN]:
        print(f"  {clip['key']}: {clip['reason']}")
    return {
        "out": str(out),
        "clips": manifest.num_clips,
        "shards": [asdict(shard) for shard in manifest.shards],
        "fingerprint": manifest.fingerprint,
        "conversion": None if manifest.conversion is None else asdict(manifest.conversion),
        **report,
    }


class _Watch:
    """A bar on a terminal, elsewhere a line every few seconds, and one at the end."""

    def __init__(self, bar: Bar, metrics_file: Path | None) -> None:
        self.stats = SharderStats()
        self._metrics_file = metrics_file
        self._bar: Callable[[int, int], None] | None = bar("shard") if sys.stderr.isatty() else None
        self._done, self._total, self._said = 0, 0, time.monotonic()

    def clip_done(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        if self._bar is not None:
            self._bar(done, total)

    def shard_done(self, stats: SharderStats) -> None:
        self.stats = stats
        if self._metrics_file is not None:
            write_textfile(self._metrics_file, stats)
        if self._bar is None and time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self.say()

    def say(self, *, last: bool = False) -> None:
        self._said = time.monotonic()
        stats, seconds = self.stats, max(self.stats.seconds, 1e-9)
        rate = stats.clips / seconds
        text = f"shard: {stats.clips} clips in {stats.shards} shards, {byte_text(stats.bytes)}"
        text += f"; {rate:.0f} clips/s, {byte_text(stats.bytes / seconds)}/s" if stats.clips else ""
        if not last and rate:
            text += f"; {self._done} of {self._total}, {(self._total - self._done) / rate:.0f} s left"
        text += f"; {stats.skipped} clips were there" if stats.skipped else ""
        text += f"; {stats.bad} bad" if stats.bad else ""
        print(text, file=sys.stderr, flush=True)
