"""A planned job as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .job import Job, by_recompute
from .memory import RESERVE, Memory

CATEGORIES = ("parameters", "optimizer", "gradients", "fast_state", "activations", "buffers", "total")


def describe_job(job: Job) -> str:
    """Memory, traffic, time and data of a step."""
    degrees, share, hardware = job.spread.degrees, job.share, job.hardware
    lines = [
        f"On {job.nodes} x {job.ranks_of_node} {hardware.name}: {job.spread.engine}, {degrees.replicate} copies of "
        f"{degrees.shard} shards, {share.clips} clips a rank in {share.micro_batches} of at most {share.micro_batch}",
        "",
        "Bytes on the rank that needs most, each at its own fullest moment, the total at one",
        f"  {'recompute':<12}" + "".join(f"{name.replace('_', ' '):>13}" for name in CATEGORIES),
    ]
    for name, other in by_recompute(job).items():
        marks = "  <- parallel.recompute" if name == job.config.parallel.recompute else ""
        lines.append(f"  {name:<12}" + "".join(f"{gib(size):>13}" for size in _sizes(other.memory)) + marks)
    if job.memory.host:
        lines.append(f"  and {gib(job.memory.host)} in host memory for each rank; no time is counted for steps there")
    fits = "fits into" if job.memory.total <= job.limit else "does NOT fit into"
    more = " (more clips than a rank has)" if job.largest_micro_batch > share.clips else ""
    lines.append(
        f"  {fits} {gib(hardware.memory_bytes)} less {RESERVE:.0%}; largest train.micro_batch that fits: "
        f"{job.largest_micro_batch}{more}"
    )
    lines += [f"  {remark}" for remark in [job.spread.uneven_shards()] if remark]
    return "\n".join([*lines, "", *_traffic(job), "", *_time(job)])


def _sizes(memory: Memory) -> list[int]:
    return [memory.by_category[name] for name in CATEGORIES]


def _traffic(job: Job) -> list[str]:
    if not job.collectives:
        return ["Nothing travels between ranks"]
    lines = ["Sent to other ranks in a step, by the rank that sends most"]
    lines.append(f"  {'what':<12}{'collective':<16}{'ranks':>6}{'number':>8}{'input':>13}{'sent':>13}")
    for each in job.collectives:
        sizes = "".join(f"{gib(size):>13}" for size in (each.input_bytes, each.sent_bytes))
        lines.append(f"  {each.what:<12}{each.kind:<16}{each.ranks:>6}{each.count:>8}{sizes}")
    return lines


def _time(job: Job) -> list[str]:
    time, hardware = job.time, job.hardware
    rate = hardware.rate(job.config.parallel.precision)
    parts = ", ".join(
        f"{name} {seconds(value)}"
        for name, value in (
            ("products", time.products),
            ("elementwise", time.elementwise),
            ("launching", time.launching),
            ("update", time.update),
            ("M3's exchange", time.exchange),
            ("other communication", time.exposed),
        )
    )
    hidden = time.communication - time.exposed
    eager = "; what compiled blocks save of that is not known" if job.config.parallel.compile else ""
    return [
        f"A step takes {seconds(time.total)}, mostly {time.bottleneck}: {parts} ({seconds(hidden)} more are hidden)",
        f"  {job.clips_per_second:,.1f} clips/s; a node reads {job.read_per_node / 1e6:,.1f} MB/s of fp16 features",
        f"  assuming {rate / 1e12:g} TFLOP/s in {job.config.parallel.precision}, "
        f"{hardware.memory_bandwidth / 1e9:g} GB/s of memory, {hardware.link_bandwidth / 1e9:g} GB/s and "
        f"{hardware.link_latency * 1e6:g} us a collective inside "
        f"a node, {hardware.network_bandwidth / 1e9:g} GB/s and {hardware.network_latency * 1e6:g} us between nodes, "
        f"{hardware.overlap:.0%} of forward and backward to hide behind, "
        f"{hardware.operator_latency * 1e6:g} us to hand an operator out{eager}",
        f"  {_standing(job)}",
    ]


def _standing(job: Job) -> str:
    fitted = job.hardware.fitted_ranks
    if fitted is None:
        return "an extrapolation: these rates are of data sheets, and no step was measured on them"
    if job.is_extrapolation:
        return f"an extrapolation: the rates were fitted to steps of up to {fitted} ranks"
    return f"within reach of the steps of up to {fitted} ranks that the rates were fitted to"


def sweep_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row of `sweep_rows`."""
    lines = [
        f"{'ranks':>6}  {'recompute':<10}{'memory':>12}  {'fits':<5}{'most at once':>14}{'step':>12}{'clips/s':>12}"
        f"{'to fewest':>11}  mostly"
    ]
    first: dict[str, float] = {}
    for row in rows:
        head = f"{row['ranks']:>6}  {row['recompute']:<10}"
        if "cannot" in row:
            lines.append(f"{head}  cannot: {row['cannot']}")
            continue
        rate = row["clips_per_second"]
        one = first.setdefault(row["recompute"], rate / row["ranks"])
        lines.append(
            f"{head}{gib(row['memory']):>12}  {'yes' if row['fits'] else 'NO':<5}{row['largest_micro_batch']:>14}"
            f"{seconds(row['seconds']):>12}{rate:>12,.1f}{rate / row['ranks'] / one:>11.0%}  {row['bottleneck']}"
        )
    return "\n".join(lines)


def gib(value: float) -> str:
    """Bytes in binary units."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value:,.0f} B"


def seconds(value: float) -> str:
    """Seconds in a fitting unit."""
    if value >= 1:
        return f"{value:,.2f} s"
    return f"{value * 1e3:,.2f} ms"
