"""Rules between sections; rules inside one live in its own schema."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.errors import Problem

from .schema import Config


def cross_section_problems(config: Config) -> Iterator[Problem]:
    """Every rule between sections that a configuration breaks."""
    patience, eval_every = config.run.early_stop.patience, config.train.eval_every
    if patience and not eval_every:
        rule = "counts evaluations, and train.eval_every=0 runs none during training"
        yield Problem("run.early_stop.patience", patience, rule, "set train.eval_every, or leave patience at 0")
    micro_batch = config.train.micro_batch
    if micro_batch is not None and micro_batch > config.train.global_batch:
        rule = f"is larger than train.global_batch={config.train.global_batch}, so it can never be filled"
        yield Problem("train.micro_batch", micro_batch, rule, "lower it")
    if config.metrics.token_file is not None and config.metrics.listen == "off":
        rule = "is ignored with metrics.listen=off"
        yield Problem("metrics.token_file", config.metrics.token_file, rule, "leave it out, or set metrics.listen=node")
