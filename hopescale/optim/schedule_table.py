"""A schedule in figures and as text; FLOPs and bytes are those of the rank that has most of what a line speaks of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from .planner import Schedule


def figures_of(schedule: Schedule, buckets: Sequence[int] | None = None) -> dict[str, Any]:
    """Exchanges, FLOPs, bytes sent to other ranks, and seconds by the cost model, of some buckets or all."""
    chosen = range(len(schedule.buckets)) if buckets is None else buckets
    ranks = range(schedule.team.size)
    exchanges = [sent.total for number in chosen for sent in schedule.traffic[number]]
    flops = [sum(schedule.flops[number][rank] for number in chosen) for rank in ranks]
    return {
        "matrices": sum(len(schedule.buckets[number].matrices) for number in chosen),
        "exchanges": sum(schedule.num_exchanges(schedule.buckets[number]) for number in chosen),
        "flops": max(flops),
        "flops_of_all_ranks": sum(flops),
        "bytes_sent": max(sum(sent[rank] for sent in exchanges) for rank in ranks),
        "seconds": schedule.seconds(chosen),
    }


def bucket_figures(schedule: Schedule) -> list[dict[str, Any]]:
    """Plan, shapes and figures of each bucket."""
    return [
        {"plan": bucket.plan, "shapes": _shapes(schedule, bucket.members), **figures_of(schedule, [number])}
        for number, bucket in enumerate(schedule.buckets)
    ]


def _shapes(schedule: Schedule, members: Iterable[int]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for layout in (schedule.layouts[member] for member in members):
        found[f"{layout.rows}x{layout.columns}"] += layout.count
    return dict(found)


def schedule_table(schedule: Schedule) -> str:
    """One line a bucket, under what the cost model takes the machine to do."""
    team, costs, precision = schedule.team, schedule.costs, schedule.newton_schulz.precision
    where = (
        "1 rank"
        if team.size == 1
        else f"{team.num_slots} ranks"
        if team.num_replicas == 1
        else f"{team.num_slots} x {team.num_replicas} ranks"
    )
    lines = [
        f"Newton-Schulz of {figures_of(schedule)['matrices']} matrices on {where}, "
        f"{precision}, busiest rank of each line, by {costs.flops_in(precision) / 1e12:g} TFLOP/s and "
        f"{costs.latency * 1e6:g} us + {costs.bandwidth / 1e9:g} GB/s an exchange"
        + (
            f", {costs.across_latency * 1e6:g} us + {costs.across_bandwidth / 1e9:g} GB/s between copies"
            if team.num_replicas > 1
            else ""
        ),
        f"  {'plan':<16}{'matrices':>9}{'exchanges':>11}{'FLOPs':>13}{'sent':>13}{'time':>12}  shapes",
    ]
    for row in bucket_figures(schedule):
        shapes = ", ".join(f"{count} of {shape}" for shape, count in row["shapes"].items())
        lines.append(f"{table_row(row['plan'], row)}  {shapes}")
    if len(schedule.buckets) > 1:
        # Another rank may be the busiest of another bucket.
        lines.append(table_row("together", figures_of(schedule)) + "  busiest rank over all lines, less than their sum")
    return "\n".join(lines)


def table_row(name: str, row: dict[str, Any]) -> str:
    """Figures under the columns of `schedule_table`."""
    return (
        f"  {name:<16}{row['matrices']:>9}{row['exchanges']:>11}{row['flops'] / 1e9:>11,.2f} G"
        f"{row['bytes_sent'] / 2**20:>9,.2f} MiB{row['seconds'] * 1e3:>9,.3f} ms"
    )
