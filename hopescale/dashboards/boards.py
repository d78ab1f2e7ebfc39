"""The dashboards: their sections, and the panels that are better made by hand than generated from the catalog.

A metric that a panel here shows on its own dashboard gets no generated panel. Queries name metrics bare; cluster, run
and so on are added.
"""

from __future__ import annotations

from hopescale.dashboards.panel import Board, Mark, Panel, Query, Section
from hopescale.dashboards.recipes import AGE_COLOURS, GOODPUT, OVER_RANKS, WAITING_COLOURS, by_class, events, over, stat

OVERVIEW = Board(
    dashboard="overview",
    uid="hopescale-overview",
    description="Is the run learning, how fast, and when will it be done?",
    sections=(
        Section(
            "Now",
            (
                stat("Step", "Optimizer updates done.", "locale", "hopescale_step", decimals=0),
                stat(
                    "Time left",
                    "Steps still to do at the mean pace of the time shown, evaluations, checkpoints and gaps included.",
                    "s",
                    "(hopescale_planned_steps - hopescale_step) / (deriv(hopescale_step[$__range]) > 0)",
                    decimals=1,
                ),
                stat("Newest loss", "Training objective.", "short", "hopescale_loss", decimals=4),
                stat(
                    "Newest skill",
                    "One step ahead on held-out clips: 0 is copying the last frame, 1 is perfect.",
                    "short",
                    'hopescale_skill{kind="one_step"}',
                    decimals=3,
                ),
                stat(
                    "Speed", "Clips of all ranks a second.", "suffix:clips/s", "hopescale_clips_per_second", decimals=1
                ),
                stat(
                    "Waiting for data",
                    "Share of the training time in which ranks waited for their next batch.",
                    "percentunit",
                    "hopescale_data_wait_ratio",
                    WAITING_COLOURS,
                    decimals=1,
                ),
                GOODPUT,
                stat(
                    "Last sign of life",
                    "Time since the last log step of the rank that has been silent longest.",
                    "s",
                    # Of a node that has died the last number counts, though it is scraped no more.
                    "time() - min by (cluster, run) (last_over_time(hopescale_last_step_timestamp_seconds[$__range]))",
                    AGE_COLOURS,
                    decimals=0,
                ),
            ),
        ),
        Section(
            "Learning",
            (
                Panel(
                    "Loss",
                    "Training objective, mean over the clips since the last log step.",
                    "short",
                    (Query("hopescale_loss"),),
                    width=12,
                ),
                Panel(
                    "Parts of the loss",
                    "What the objective is made of, each before its weight.",
                    "short",
                    tuple(
                        Query(f"hopescale_loss_{part}", f"{{{{run}}}} {part}")
                        for part in ("teacher", "jump", "rollout", "auxiliary")
                    ),
                    width=12,
                ),
                Panel(
                    "Skill",
                    "1 - error / error of copying, on held-out clips: 0 is copying, 1 is perfect.",
                    "short",
                    (Query("hopescale_skill", "{{run}} {{kind}}"),),
                ),
            ),
            takes=("loss", "skill", "identity_ratio", "action_sensitivity"),
        ),
        Section(
            "Speed",
            (
                Panel(
                    "Throughput",
                    "Clips of all ranks a second, while training and over all: the difference is "
                    "evaluation, checkpoints and restarts.",
                    "suffix:clips/s",
                    (
                        Query("hopescale_clips_per_second", "{{run}} training"),
                        Query(over("clips_total", "goodput_seconds_total"), "{{run}} over all"),
                    ),
                    low=0,
                ),
                Panel(
                    "Step time over ranks",
                    "Mean duration of a step since the last log step: all ranks wait for the slowest.",
                    "s",
                    OVER_RANKS,
                    low=0,
                ),
                Panel(
                    "Time spent training",
                    "Share of the time spent in training steps; the rest is evaluation and checkpoints.",
                    "percentunit",
                    (Query(over("train_seconds_total", "goodput_seconds_total")),),
                    low=0,
                    high=1,
                ),
                Panel(
                    "Time spent waiting for data",
                    "Share of the training time in which ranks waited for their next batch.",
                    "percentunit",
                    (Query("hopescale_data_wait_ratio"),),
                    low=0,
                ),
            ),
            takes=("attempted_steps", "flops"),
        ),
        Section(
            "The run",
            (
                Panel(
                    "Progress",
                    "Optimizer updates done, and after how many the run is.",
                    "locale",
                    (Query("hopescale_step", "{{run}} done"), Query("hopescale_planned_steps", "{{run}} planned")),
                    width=24,
                    height=6,
                    low=0,
                ),
            ),
            takes=("run_info",),
        ),
    ),
)

OPTIMIZER = Board(
    dashboard="optimizer and memories",
    uid="hopescale-optimizer",
    description="Do gradients, updates and memory writes stay in a healthy range?",
    sections=(
        Section("Schedule", takes=("learning_rate", "objective_weight", "curriculum_")),
        Section(
            "Parameters",
            (
                Panel(
                    "Gradient norm",
                    "L2 norm of the unsharded gradient before clipping, by parameter group.",
                    "short",
                    (Query("hopescale_grad_norm", "{{run}} {{group}}"),),
                    width=12,
                    logarithmic=True,
                ),
                Panel(
                    "Size of updates",
                    "Norm of what a group's last step changed, decay included, over that of its "
                    "parameters: about a thousandth is healthy.",
                    "short",
                    (Query("hopescale_update_ratio", "{{run}} {{group}}"),),
                    width=12,
                    logarithmic=True,
                ),
            ),
            takes=("param_norm", "dead_fraction"),
        ),
        Section(
            "Fast weights",
            (
                Panel(
                    "Surprise",
                    "Squared distance of a write's prediction and target over the sum of their squares: "
                    "0 is foreseen, 2 is the opposite.",
                    "short",
                    (Query('hopescale_memory_surprise{frame="all"}'),),
                ),
                Panel(
                    "Surprise by frame",
                    "The same by the first frame of what is written: it should fall along a clip.",
                    "short",
                    (Query('hopescale_memory_surprise{frame!="all"}', "{{run}} frame {{frame}}"),),
                ),
                Panel(
                    "Retention",
                    "Share of the memories that a write keeps, and the smallest such share of a clip.",
                    "percentunit",
                    (
                        Query("hopescale_memory_retention", "{{run}} mean"),
                        Query("hopescale_memory_retention_min", "{{run}} smallest"),
                    ),
                ),
                Panel(
                    "Step size of writes",
                    "Summed over a write's tokens, and the 99th percentile of its tokens times their number.",
                    "short",
                    (
                        Query("hopescale_memory_step_size", "{{run}} sum"),
                        Query("hopescale_memory_step_size_p99", "{{run}} 99th percentile"),
                    ),
                ),
            ),
            takes=("memory_",),
        ),
        Section("Continuum memory", takes=("cms_",)),
    ),
)

DATA = Board(
    dashboard="data",
    uid="hopescale-data",
    description="Does reading keep up with training, and is the data sound?",
    sections=(
        Section(
            "Keeping up",
            (
                Panel(
                    "What readers spend time on",
                    "Seconds a second, of all ranks together: 2 is two threads that do nothing else.",
                    "short",
                    tuple(
                        (
                            Query(
                                f"rate(hopescale_reader_{what}_seconds_total[$__rate_interval])", f"{{{{run}}}} {shown}"
                            )
                            for what, shown in (
                                ("read", "reading and decoding"),
                                ("checksum", "of it checksums"),
                                ("copy", "copying to the device"),
                                ("wait", "waiting inside the reader"),
                            )
                        )
                    ),
                ),
            ),
            takes=("data_wait", "reader_ready_batches", "reader_clips", "reader_bytes"),
        ),
        Section(
            "Copies on the node",
            (
                Panel(
                    "Shards found and fetched",
                    "Shards that were among the copies on the node, and shards that had to be fetched.",
                    "suffix:shards/s",
                    (
                        Query("rate(hopescale_reader_cache_hits_total[$__rate_interval])", "{{run}} found"),
                        Query("rate(hopescale_reader_cache_misses_total[$__rate_interval])", "{{run}} fetched"),
                    ),
                ),
            ),
            takes=("reader_cache",),
        ),
        Section(
            "Trouble",
            (
                Panel(
                    "Damaged clips",
                    "Clips read again, clips whose bytes did not match their checksum, and clips given up, by reason.",
                    "locale",
                    (
                        Query("increase(hopescale_reader_retries_total[$__rate_interval])", "{{run}} read again"),
                        Query(
                            "increase(hopescale_reader_checksum_errors_total[$__rate_interval])",
                            "{{run}} wrong checksum",
                        ),
                        Query(
                            "increase(hopescale_reader_bad_clips_total[$__rate_interval])",
                            "{{run}} given up: {{reason}}",
                        ),
                    ),
                    kind="bars",
                    width=12,
                    low=0,
                ),
                Panel(
                    "Batches that needed new memory",
                    "Because the trainer held on to all there was: each costs an allocation.",
                    "locale",
                    (Query("increase(hopescale_reader_ring_overflows_total[$__rate_interval])"),),
                    kind="bars",
                    width=12,
                    low=0,
                ),
            ),
        ),
        Section("Place in the data", takes=("reader_epoch", "reader_position")),
    ),
)

RELIABILITY = Board(
    dashboard="checkpoints and reliability",
    uid="hopescale-reliability",
    description="What would a crash cost, and what did crashes cost so far?",
    sections=(
        Section(
            "Now",
            (
                GOODPUT,
                stat(
                    "Steps at risk",
                    "Steps since the last committed checkpoint, which a crash would lose.",
                    "locale",
                    "hopescale_step - hopescale_last_checkpoint_step",
                    decimals=0,
                ),
                stat(
                    "Checkpoint age",
                    "Time since the last checkpoint was committed.",
                    "s",
                    "time() - hopescale_last_checkpoint_timestamp_seconds",
                    decimals=0,
                ),
                stat("Ranks", "Ranks of this incarnation, whether they answer or not.", "locale", "hopescale_ranks"),
                events("Restarts", "Times the run was started again in the time shown.", "restarts_total"),
                events("Preemptions", "Times it was told to stop, and committed first.", "preemptions_total"),
                events(
                    "Failed checkpoints",
                    "Checkpoints that could not be written in the time shown.",
                    "checkpoint_failures_total",
                ),
                events("Skipped steps", "Steps whose gradients were not finite.", "nonfinite_steps_total"),
            ),
        ),
        Section(
            "Where the time goes",
            (
                Panel(
                    "Time by class",
                    "What time goes into; that between two incarnations counts at the restart.",
                    "percentunit",
                    by_class("rate", "$__rate_interval"),
                    width=12,
                    height=9,
                    shares=True,
                    low=0,
                ),
                Panel(
                    "Time by class, in all",
                    "What the time shown went into.",
                    "s",
                    by_class("increase", "$__range"),
                    kind="gauges",
                    width=7,
                    height=9,
                    low=0,
                ),
                Panel(
                    "Goodput over time",
                    "Share of the time since the run's first start that went into steps that count.",
                    "percentunit",
                    (Query("hopescale_goodput_ratio"),),
                    width=5,
                    height=9,
                    low=0,
                    high=1,
                ),
            ),
        ),
        Section(
            "Checkpoints",
            (
                Panel(
                    "Steps since the last checkpoint",
                    "What a crash would lose at each moment.",
                    "locale",
                    (Query("hopescale_step - hopescale_last_checkpoint_step"),),
                    low=0,
                ),
            ),
            takes=("checkpoint_", "disk_"),
        ),
    ),
)

NODES = Board(
    dashboard="per node",
    uid="hopescale-nodes",
    description="Which rank is slow, silent or short of memory?",
    filters=("node", "rank"),
    sections=(
        Section(
            "Ranks",
            (
                Panel(
                    "Step time",
                    "Mean duration of a rank's step since the last log step.",
                    "s",
                    (Query("hopescale_step_seconds", "{{run}} {{node}} rank {{rank}}"),),
                    width=12,
                    low=0,
                ),
                Panel(
                    "Slower than the median rank",
                    "A rank's step time over the median of those shown: one that stays above 1 holds up all others.",
                    "percentunit",
                    (
                        Query(
                            "hopescale_step_seconds / on (cluster, run) group_left () "
                            "quantile by (cluster, run) (0.5, hopescale_step_seconds)",
                            "{{run}} {{node}} rank {{rank}}",
                        ),
                    ),
                    width=12,
                ),
            ),
            takes=("last_step_timestamp", "memory_"),
        ),
        Section(
            "Nodes",
            (
                Panel(
                    "Endpoints that answer",
                    "Nodes whose metrics endpoint could be scraped.",
                    "locale",
                    (
                        Query('sum by (cluster, run) (up{job="hopescale"})', "{{run}} answer"),
                        Query('count by (cluster, run) (up{job="hopescale"})', "{{run}} are known"),
                    ),
                    width=24,
                    height=6,
                    low=0,
                ),
            ),
        ),
    ),
)

BOARDS = (OVERVIEW, OPTIMIZER, DATA, RELIABILITY, NODES)
"""In the order of the links between them."""

_NEW_CHECKPOINT = (
    "changes(hopescale_last_checkpoint_step[$__rate_interval]) > 0 "
    "or (hopescale_last_checkpoint_step unless hopescale_last_checkpoint_step offset $__rate_interval)"
)
# An incarnation has a series of its own, so that one which was not there before is a start, wherever the run went and
# however long it was gone. The counter of restarts moves then too, but across a gap no rate sees that.
_NEW_INCARNATION = "hopescale_run_info unless hopescale_run_info offset $__rate_interval"
MARKS = (Mark("Checkpoint", _NEW_CHECKPOINT, "blue"), Mark("Start", _NEW_INCARNATION, "orange"))
