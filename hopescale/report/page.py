"""Write RUN/report: one PNG per figure and index.html, a single page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hopescale.report import pictures, plots, tables
from hopescale.report.evaluation import RunRecord, load_run
from hopescale.report.files import png, write_whole
from hopescale.report.stylesheet import STYLESHEET

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUMMARY_FIELDS = (
    "run.name",
    "data.path",
    "data.view",
    "model.block_pattern",
    "model.memory.heads",
    "model.memory.scope",
    "model.memory.chunk_size",
    "model.cms.mode",
    "model.cms.levels",
    "train.steps",
    "train.global_batch",
    "train.seed",
    "parallel.engine",
    "parallel.precision",
)
_BASELINES = (
    ("copy last", "copy_last_one_step", "copy_last_far"),
    ("mean frame", "mean_frame_one_step", "mean_frame_far"),
)
_SKILL_CARDS = (
    ("skill_one_step", "one step", "next frame from all true frames before it"),
    ("skill_far", "far", "free rollout from the first frame alone"),
    ("skill_jump", "jump", "first frame straight to a later one"),
)


@dataclass(frozen=True)
class Panel:
    """One figure of the page.

    Attributes:
        name: file name of the PNG without its ending.
        title: heading above the figure.
        alternative: what the picture shows, for readers who cannot see it.
        caption: how to read it.
        build: makes the figure.
    """

    name: str
    title: str
    alternative: str
    caption: str
    build: Callable[[], Figure]


def write_report(run: Path) -> Path:
    """Write every figure and the page of a run that has been evaluated; files appear whole or not at all.

    Args:
        run: run folder with config.yaml, metrics.jsonl, result.json and report/evaluation.npz.

    Returns:
        Path of RUN/report/index.html.

    Raises:
        UserError: an input file is missing or unreadable; the message names it and the command that makes it.
        MissingExtra: matplotlib is not installed.
    """
    record = load_run(Path(run))
    folder = record.folder / "report"
    images: dict[str, bytes] = {}
    panels = _panels(record)
    for panel in panels:
        images[panel.name] = png(panel.build())
        write_whole(folder / f"{panel.name}.png", images[panel.name])
    for stale in folder.glob("clip-*.png"):
        if stale.stem not in images:
            stale.unlink()
    page = folder / "index.html"
    write_whole(page, _html(record, panels, images).encode())
    return page


def _panels(record: RunRecord) -> list[Panel]:
    """Return the figures this run has data for, in page order; the first one opens the page."""
    evaluation = record.evaluation
    far, last = evaluation.rollout_error[:, -1].mean(), int(evaluation.horizons[-1])
    still = evaluation.copy_last_error[:, -1].mean()
    panels = [
        Panel(
            "overview",
            "At a glance",
            f"A held-out clip with true and predicted features. At horizon {last} the mean error is {far:.3f}; "
            f"copying the last frame gives {still:.3f}.",
            "Left: the model sees the first frame and the actions, then predicts the rest from its own output. "
            "Colours are the first three principal components of the true features; the same colour means the same "
            "feature in both rows. Right: error of that rollout over all held-out clips; the shaded gap is the "
            "difference to repeating the first frame.",
            lambda: pictures.overview(evaluation),
        ),
        Panel(
            "losses",
            "Training",
            "Training losses over optimizer steps on a log scale, and held-out skill at each evaluation.",
            "Left: thin lines are single steps, thick lines a moving average. Right: skill on held-out clips during "
            "training; below 0 the model is worse than repeating the last frame (values under -1 are cut off).",
            lambda: plots.loss_curves(record.metrics),
        ),
        Panel(
            "horizons",
            "Error over the rollout",
            f"Rollout error at horizons 1 to {last} for the model, copy-last, mean-frame, shuffled actions and memory "
            "writes off; first the mean over partitions, then each partition.",
            "Lower is better. The model should lie below copy last and mean frame. Shuffled actions: another clip's "
            "actions; if this line meets the model's, actions are ignored. Writes off: the same weights with every "
            "memory write disabled; if it meets the model's, the memories do nothing. Small panels share one scale.",
            lambda: plots.horizon_errors(evaluation),
        ),
        Panel(
            "one_step",
            "Error of the next frame",
            "One-step error against the number of true frames seen, model and copy-last.",
            "Here the model gets every true frame before the one it predicts. A line that falls faster than copy last "
            "means that the model learns about the clip while it watches. Thin lines are single partitions.",
            lambda: plots.one_step_errors(evaluation),
        ),
    ]
    if evaluation.sample_frames is not None:
        panels.append(_filmstrip_panel(record))
    panels += [_clip_panel(record, clip) for clip in range(len(evaluation.sample_keys))]
    return panels + _memory_panels(record)


def _filmstrip_panel(record: RunRecord) -> Panel:
    return Panel(
        "filmstrip",
        "Where the rollout errs",
        "Video frames of held-out clips and, below each, the rollout error of every patch laid over the faded frame.",
        "Each square is one patch token; the darker the red, the larger the error between predicted and true features. "
        "Errors ahead of or behind the object mean wrong speed; errors everywhere mean a wrong background.",
        lambda: pictures.filmstrip(record.evaluation),
    )


def _clip_panel(record: RunRecord, clip: int) -> Panel:
    partition, key = record.evaluation.sample_partitions[clip], record.evaluation.sample_keys[clip]
    return Panel(
        f"clip-{clip}",
        f"Features of clip {key}",
        f"Feature maps of clip {key} from partition {partition}, a column per frame: truth, rollout, error.",
        "Top: true features. Middle: rollout from frame 0. Bottom: mean absolute difference per patch. The principal "
        "components are fitted on the true features of all sample clips only, so the prediction cannot pick flattering "
        "colours; colours and the error scale are the same for every clip.",
        lambda: pictures.pca_rgb(record.evaluation, clip),
    )


def _memory_panels(record: RunRecord) -> list[Panel]:
    evaluation, panels = record.evaluation, []
    if evaluation.surprise.size:
        panels.append(
            Panel(
                "surprise",
                "Surprise of the memories",
                "Mean surprise of each memory block at every transition of the held-out clips.",
                "Surprise is how strongly a memory is pushed to change by the frame it reads. It should fall within a "
                "clip as the memory takes the clip in, and rise where something new happens.",
                lambda: plots.surprise_over_frames(evaluation),
            )
        )
    if not evaluation.cms_active.all():
        panels.append(
            Panel(
                "cms",
                "Activity of the memory levels",
                "Raster of Continuum Memory System levels that are active at each transition.",
                "Blue: the level is active at this frame. Slow levels are active rarely; one that is never blue took "
                "no part in these clips. Blocks with the same pattern share one raster.",
                lambda: plots.cms_activity(evaluation),
            )
        )
    return panels


def _html(record: RunRecord, panels: Sequence[Panel], images: Mapping[str, bytes]) -> str:
    name = str(_lookup(record.config, "run.name") or record.folder.resolve().name)
    first, *rest = (_figure(panel, images[panel.name]) for panel in panels)
    body = [
        f"<header><p class=kicker>hopescale report</p><h1>{escape(name)}</h1></header>",
        first,
        _results(record),
        *rest,
        _notes(record),
        _provenance(record),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            # The page holds names from data sets: even if one slipped through unescaped, nothing may run or load.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            f"<title>{escape(name)} · hopescale report</title><style>{STYLESHEET}</style></head>",
            "<body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )


def _figure(panel: Panel, image: bytes) -> str:
    data = base64.b64encode(image).decode("ascii")
    return (
        f"<section><h2>{escape(panel.title)}</h2><figure>"
        f'<img src="data:image/png;base64,{data}" alt="{escape(panel.alternative)}">'
        f"<figcaption>{escape(panel.caption)}</figcaption></figure></section>"
    )


def _results(record: RunRecord) -> str:
    cards = "".join(
        f"<div class=card><strong>{tables.number(record.result.get(key), 2)}</strong>"
        f"<span>skill, {title}</span><small>{text}</small></div>"
        for key, title, text in _SKILL_CARDS
    )
    header, *rows = tables.result_table(record.result)
    baselines = record.result.get("baselines") or {}
    baseline_rows = [
        [title, tables.number(baselines.get(one), 4), tables.number(baselines.get(far), 4)]
        for title, one, far in _BASELINES
    ]
    seconds = [[str(key), tables.number(value, 1)] for key, value in (record.result.get("seconds") or {}).items()]
    return (
        f"<section><h2>Results</h2><div class=cards>{cards}</div>"
        "<p>Error is the mean absolute difference between LayerNormed predicted and true features on held-out clips. "
        "<b>Skill</b> = 1 - error / error of copy last: 1 is perfect, 0 is no better than repeating the last frame, "
        "below 0 is worse. <b>Shuffled</b> and <b>writes off</b> are error ratios: how many times larger the error "
        "gets with another clip's actions, or with memory writes disabled. 1 means that it makes no difference.</p>"
        f"{_table(header, rows, last_bold=True)}"
        f"<div class=pair><div><h3>Error of the baselines</h3>{_table(['baseline', 'one step', 'far'], baseline_rows)}"
        f"</div><div><h3>Time</h3>{_table(['stage', 'seconds'], seconds)}</div></div></section>"
    )


def _notes(record: RunRecord) -> str:
    """List what the page leaves out and why; nothing if nothing."""
    notes = []
    if record.evaluation.sample_frames is None:
        notes.append(
            "No video rows: the pixels folder was not known when the run was evaluated, so features are shown alone."
        )
    if not record.evaluation.surprise.size:
        notes.append("No surprise figure: the model has no memory blocks.")
    if not record.evaluation.cms_active.size:
        notes.append("No activity figure: the model has no Continuum Memory System.")
    elif record.evaluation.cms_active.all():
        notes.append("No activity figure: every level of the Continuum Memory System acts at every frame.")
    if record.unreadable_lines:
        notes.append(f"{record.unreadable_lines} unreadable lines of metrics.jsonl were skipped.")
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<section><h2>Left out</h2><ul>{items}</ul></section>" if notes else ""


def _provenance(record: RunRecord) -> str:
    facts = record.result.get("run")
    facts = dict(facts) if isinstance(facts, Mapping) else {}
    command = facts.pop("command", None)
    if isinstance(command, Sequence) and not isinstance(command, str):
        command = " ".join(str(word) for word in command)
    rows = [[field, _plain(_lookup(record.config, field))] for field in _SUMMARY_FIELDS]
    rows = [row for row in rows if row[1]]
    rows += [[f"run: {key}", _plain(value)] for key, value in facts.items()]
    command_text = escape(str(command)) if command else "not recorded in result.json"
    return (
        f"<section><h2>How it was made</h2><pre>{command_text}</pre>"
        f"{_table(['setting', 'value'], rows, numeric=False)}"
        f"<details><summary>Resolved config</summary><pre>{escape(record.config_text)}</pre></details></section>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], last_bold: bool = False, numeric: bool = True) -> str:
    if not rows:
        return "<p>not recorded</p>"
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = []
    for index, (first, *cells) in enumerate(rows):
        mark = " class=total" if last_bold and index == len(rows) - 1 else ""
        body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr{mark}><th scope="row">{escape(first)}</th>{body}</tr>')
    kind = " class=numeric" if numeric else ""
    return f"<div class=scroll><table{kind}><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _lookup(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _plain(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)
