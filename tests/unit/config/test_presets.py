from __future__ import annotations

import re

import pytest
import torch

from hopescale.config.compose import configs_folder, load_config
from hopescale.model.build import build_predictor
from hopescale.model.counts import parameter_count
from hopescale.optim.routing import parameter_groups
from tests.presets import PARAMETERS


@pytest.mark.parametrize("preset", PARAMETERS)
def test_a_preset_has_exactly_its_number_of_parameters(preset: str) -> None:
    config = load_config([f"experiment={preset}"])
    with torch.device("meta"):
        built = sum(p.numel() for p in build_predictor(config.model).parameters())
    assert (built, parameter_count(config.model)) == (PARAMETERS[preset], PARAMETERS[preset])
    text = (configs_folder() / "model" / f"{preset}.yaml").read_text()
    assert f"{PARAMETERS[preset]:,}" in text.split("\n\n")[0]
    assert config.run.name == preset


@pytest.mark.parametrize("preset", PARAMETERS)
def test_an_experiment_opens_with_its_command_hardware_and_what_to_expect(preset: str) -> None:
    text = (configs_folder() / "experiment" / f"{preset}.yaml").read_text()
    header = re.match(r"# @package _global_\n((?:#.*\n)+)", text)
    assert header is not None
    found = dict(re.findall(r"^#   (Command|Hardware|Expect) +(\S.*)$", header[1], flags=re.MULTILINE))
    assert list(found) == ["Command", "Hardware", "Expect"]
    assert f"experiment={preset} " in found["Command"]


def test_the_published_recipe_comes_through_inheritance() -> None:
    one, three, five, eight = (load_config([f"experiment={name}"]) for name in ("phase1", "phase3", "phase5", "phase8"))
    rates = [(c.optimizer.lr, c.optimizer.groups.titan.lr_scale, c.optimizer.clip.max_norm) for c in (one, three, five)]
    assert rates == [(1.5e-4, 0.2, 3.0), (2.5e-4, 0.3, 1.5), (2.5e-4, 0.3, 1.5)]
    assert [c.train.micro_batch for c in (one, three, five)] == [None, 8, None]
    warm_up = [c.optimizer.lr * c.optimizer.schedule.start for c in (one, three, five, eight)]
    assert warm_up == pytest.approx([3e-5, 5e-5, 5e-5, 7.5e-5], rel=1e-4)
    assert {c.optimizer.groups.titan.weight_decay for c in (one, three, five, eight)} == {0.005}
    assert {group.algorithm for c in (one, three, five, eight) for _, group in c.optimizer.groups} == {"adamw"}
    phase4 = load_config(["experiment=phase4"])
    muon = phase4.optimizer
    assert ([level.eta for level in muon.levels], muon.groups.cms.algorithm, muon.groups.titan.algorithm) == (
        [0.95],
        "m3",
        "adamw",
    )
    with torch.device("meta"):
        groups = parameter_groups(build_predictor(phase4.model).named_parameters(), muon)
    numbers = dict.fromkeys(("m3", "adamw"), 0)
    for group in groups:
        numbers[group["algorithm"]] += sum(p.numel() for p in group["params"])
    assert numbers == {"m3": 12_926_976, "adamw": 29_957_824}
