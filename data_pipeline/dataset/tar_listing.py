"""What the headers of somebody's tars say: which clips they hold, of what kind, and everything that is wrong."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from data_pipeline.alignment import ALIGNMENTS, ActionAlignment
from data_pipeline.dataset.consistency import is_shard_name
from data_pipeline.dataset.samples import samples
from data_pipeline.dataset.tar_clips import TarClip, TarLayout, Unusable
from data_pipeline.dataset.tar_pass import ListedClip
from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.schema import FIELDS, EncodeMode, Provenance
from data_pipeline.shard.plan import SMALL_SOURCE
from data_pipeline.shard.statistics import SAMPLE_EVERY, phases
from data_pipeline.shard.walk import BadTar, open_regular
from data_pipeline.sources.agreement import check_keys
from data_pipeline.sources.base import Listing, SourceClip
from data_pipeline.sources.labels import labels
from data_pipeline.sources.layout import FEATURES_DTYPES
from data_pipeline.sources.provenance import likely_grid
from data_pipeline.sources.stored import printable, reason
from data_pipeline.sources.tar_files import find_tars

StatisticsMode = Literal["auto", "all", "sample"]
SOURCE = "tars"
MAX_PROBLEMS = 20
COPY_AGAIN = "copy the tar again; `tar tf FILE` shows how far it can be read"


@dataclass(frozen=True)
class IndexSettings:
    """How tars of others are understood.

    Attributes:
        fields: `FIELD:MEMBER,...`, names of members without the key, e.g. `features:emb.npy,actions:acts.npy`. Fields
            not named are `FIELD.npy`, and features also `npy`.
        tokens: Tokens of a frame, N: needed for features `[F * N, E]`.
        features_dtype: What unsigned integers in place of features are: bfloat16, float8_e4m3fn or float8_e5m2.
        encode_mode: Which frames each feature was computed from.
        encoder: Encoder id.
        action_alignment: How recorded actions become one per transition.
        partitions: Rules such as `base=clip_0..clip_5000` or `ice=ice_*` where the samples name no partition.
        split: `heldout=SHARE` or `heldout_last=SHARE` where the samples name no split.
        statistics: all takes every training token, sample one of eight; auto takes all below 256 MiB of features.

    Entries `partition`, `split`, `encode_mode`, `encoder`, `action_alignment`, `dtypes` of a sample's meta.json say the
    same for one sample; a setting that contradicts them is an error.
    """

    fields: str = ""
    tokens: int | None = None
    features_dtype: str | None = None
    encode_mode: EncodeMode | None = None
    encoder: str | None = None
    action_alignment: ActionAlignment | None = None
    partitions: Sequence[str] = ()
    split: str | None = None
    statistics: StatisticsMode = "auto"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            DataError: Names all that are wrong.
        """
        choices = {
            "features_dtype": [name for name in FEATURES_DTYPES if name in STORED_TYPES],
            "encode_mode": get_args(EncodeMode),
            "action_alignment": ALIGNMENTS,
            "statistics": get_args(StatisticsMode),
        }
        problems = [
            Problem(name, getattr(self, name), "there is no such thing", nearest(str(getattr(self, name)), valid))
            for name, valid in choices.items()
            if getattr(self, name) is not None and getattr(self, name) not in valid
        ]
        if self.tokens is not None and self.tokens < 1:
            problems.append(Problem("tokens", self.tokens, "a frame has at least one token", "correct it"))
        if self.encoder is not None and not (self.encoder.isprintable() and 0 < len(self.encoder) <= 200):
            problems.append(Problem("encoder", printable(self.encoder[:200]), "must be a short text", "correct it"))
        if problems:
            raise DataError(problems)

    def layout(self) -> TarLayout:
        """Return how samples are read.

        Raises:
            DataError: `fields` has another form.
        """
        members = {name: (f"{name}.npy",) for name in FIELDS} | {"features": ("features.npy", "npy")}
        for part in filter(None, self.fields.split(",")):
            name, _, member = part.partition(":")
            if name not in FIELDS:
                raise DataError(Problem("fields", part, "there is no such field", nearest(name, FIELDS)))
            if not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", member):
                fix = "write fields=features:emb.npy,actions:acts.npy for members KEY.emb.npy and KEY.acts.npy"
                raise DataError(Problem("fields", part, "must be FIELD:MEMBER, the member's name without its key", fix))
            members[name] = (member.lower(),)
        return TarLayout(members, self.tokens, self.features_dtype, self.action_alignment)


@dataclass
class ListedTars:
    """What the headers of all tars say.

    Attributes:
        layout: Of the samples, with everything decided that the samples themselves say.
        like: The first clip.
        tars: Names, and how many clips each has.
        clips: Of all tars, with partitions and splits.
        lengths: Frames of each.
        partitions: Names, in the order of the manifest.
        provenance: Of the features.
        action_alignment: Of the actions.
        statistics: As asked for.
    """

    layout: TarLayout
    like: TarClip
    tars: dict[str, int]
    clips: Sequence[SourceClip]
    lengths: list[int]
    partitions: tuple[str, ...]
    provenance: Provenance
    action_alignment: ActionAlignment
    statistics: StatisticsMode

    @property
    def sample_every(self) -> int:
        """Statistics take one of so many (frame, token) pairs."""
        spec = self.like.specs["features"]
        nbytes = sum(self.lengths) * math.prod(spec.shape[1:]) * STORED_TYPES[spec.dtype].itemsize
        every = {"all": 1, "sample": SAMPLE_EVERY, "auto": 1 if nbytes < SMALL_SOURCE else SAMPLE_EVERY}
        return every[self.statistics]

    def listed(self) -> Iterator[tuple[str, list[ListedClip]]]:
        """Yield each tar's name and clips."""
        number = {name: code for code, name in enumerate(self.partitions)}
        known = zip(self.clips, self.lengths, strict=True)
        before = phases((clip.key, clip.split or "train", frames) for clip, frames in known)
        listed = [ListedClip(c.key, number[c.partition], c.split or "train", before[c.key]) for c in self.clips]
        start = 0
        for name, count in self.tars.items():
            yield name, listed[start : start + count]
            start += count


def list_tars(folder: Path, settings: IndexSettings) -> ListedTars:
    """Look at the headers of all tars in a folder.

    Raises:
        DataError: Names each tar, sample and member that cannot be indexed where it lies (up to 20), and what to do.
    """
    return _Look(folder, settings).run(_tars(folder))


@dataclass
class _Look:
    folder: Path
    settings: IndexSettings
    problems: list[Problem] = field(default_factory=list)
    stated: dict[str, Counter[str | None]] = field(default_factory=dict)
    like: TarClip | None = None

    def run(self, tars: Sequence[str]) -> ListedTars:
        clips: list[SourceClip] = []
        lengths: list[int] = []
        counts: dict[str, int] = {}
        layout = self.settings.layout()
        for name in tars:
            before = len(clips)
            for clip in self._clips(name, layout):
                split: Any = clip.description.get("split")
                clips.append(SourceClip(clip.key, clip.description.get("partition", ""), split, {}, "", name))
                lengths.append(clip.length)
            counts[name] = len(clips) - before
        encode_mode: Any = self._agreed("encode_mode", self.settings.encode_mode, "unknown")
        alignment: Any = self._agreed("action_alignment", self.settings.action_alignment, "as-is")
        encoder = self._agreed("encoder", self.settings.encoder, "unknown")
        if self.problems or self.like is None:
            raise DataError(self.problems[:MAX_PROBLEMS])
        check_keys(((clip.key, clip.where) for clip in clips), "tars", self.folder)
        labelled = labels(self.settings.partitions, self.settings.split).apply(Listing(clips)).clips
        return ListedTars(
            layout=layout,
            like=self.like,
            tars=counts,
            clips=labelled,
            lengths=lengths,
            partitions=tuple(dict.fromkeys(clip.partition for clip in labelled)),
            provenance=_provenance(self.like, encoder, encode_mode),
            action_alignment=alignment,
            statistics=self.settings.statistics,
        )

    def _clips(self, name: str, layout: TarLayout) -> Iterator[TarClip]:
        """Yield the clips of a tar that can be used, and note the others."""
        if len(self.problems) >= MAX_PROBLEMS:
            return
        count = 0
        try:
            descriptor = open_regular(self.folder / name)
        except (OSError, BadTar) as error:
            self._note(name, reason(error), COPY_AGAIN)
            return
        try:
            for sample in samples(descriptor):
                count += 1
                try:
                    clip = layout.clip(descriptor, sample)
                except Unusable as error:
                    self._note(f"{name}, sample {printable(sample.key[:200])}", str(error), error.fix)
                    continue
                self.like = self.like or clip
                if difference := clip.difference(self.like):
                    self._note(f"{name}, sample {clip.key}", difference, "keep clips of one kind in one data set")
                    continue
                for entry in ("encode_mode", "action_alignment", "encoder"):
                    self.stated.setdefault(entry, Counter())[clip.description.get(entry)] += 1
                yield clip
            if not count:
                self._note(name, "it has no samples: members KEY.NAME", "move it out of the folder")
        except (OSError, BadTar) as error:
            self._note(name, reason(error), COPY_AGAIN)
        finally:
            os.close(descriptor)

    def _note(self, where: str, rule: str, fix: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem("tars", where, printable(rule), fix))

    def _agreed(self, entry: str, setting: str | None, default: str) -> str:
        """Return what the setting or all samples say of one entry, and note contradictions."""
        counts = self.stated.get(entry, Counter())
        said = sorted(value for value in counts if value is not None)
        if setting is not None and (others := [value for value in said if value != setting]):
            rule = f"{counts[others[0]]} samples say {others[0]} in their meta.json"
            self.problems.append(Problem(entry, setting, rule, "leave the setting out, or correct the samples"))
        elif setting is None and len(said) > 1:
            rule = "samples say different things in their meta.json"
            self.problems.append(Problem(entry, ", ".join(said[:5]), rule, "keep them in different data sets"))
        elif setting is None and said and counts[None]:
            rule = f"{counts[None]} samples do not say it in their meta.json, as {counts[said[0]]} others do"
            self.problems.append(Problem(entry, said[0], rule, f"set {entry}={said[0]} if it holds for all"))
        return setting or (said[0] if said else default)


def _provenance(like: TarClip, encoder: str, encode_mode: EncodeMode) -> Provenance:
    grid = like.grid or likely_grid(like.specs["features"].shape[1])
    return Provenance(encoder, "", encode_mode, "unknown", grid, "", "", SOURCE)


def _tars(folder: Path) -> list[str]:
    problems = []
    try:
        found = find_tars(folder)
    except OSError as error:
        raise DataError(Problem("tars", folder, reason(error), "correct the path")) from error
    tars = sorted(name for name in found.tars if "/" not in name)
    for name in tars:
        if not is_shard_name(name):
            rule = "a shard's name has letters, digits, dots, _ and -, and starts with none of the last two"
            problems.append(Problem("tars", printable(name), rule, "rename it"))
    for name, rule in found.unread.items():
        problems.append(Problem("tars", printable(name), rule, "put tars in its place, or move it out of the folder"))
    deeper = [name for name in found.tars if "/" in name]
    if deeper:
        rule = f"{len(deeper)} tars lie in folders of their own"
        fix = "name that folder, or move them into one folder"
        problems.append(Problem("tars", printable(deeper[0]), rule, fix))
    if not tars and not problems:
        problems.append(Problem("tars", folder, "there is no .tar file in the folder", "correct the path"))
    if problems:
        raise DataError(problems[:MAX_PROBLEMS])
    return tars
