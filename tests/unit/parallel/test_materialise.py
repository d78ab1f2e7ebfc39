"""Models that are built without memory begin as those that are built with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hopescale.config.compose import load_config
from hopescale.model.build import build_predictor
from hopescale.model.init import initialise
from hopescale.parallel.materialise import materialise, parameters_on_meta

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "settings", [["experiment=demo"], ["model=phase8", "model.width=48"], ["model=ac_hope"]], ids=str
)
def test_a_model_without_memory_gets_the_numbers_of_one_built_whole(settings: list[str]) -> None:
    config = (
        load_config([*settings, "model.block_pattern=[H]"])
        if "model=ac_hope" not in settings
        else load_config(settings)
    )
    with parameters_on_meta():
        model = build_predictor(config.model)
    assert all(parameter.is_meta for parameter in model.parameters())
    materialise(model, CPU, 3)
    whole = build_predictor(config.model)
    initialise(whole, 3)
    found, expected = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, whole))
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_what_is_built_afterwards_has_memory_also_after_an_error() -> None:
    with pytest.raises(ValueError, match="stop"), parameters_on_meta():
        raise ValueError("stop")
    assert not nn.Linear(2, 3).weight.is_meta


def test_frozen_parameters_stay_frozen() -> None:
    with parameters_on_meta():
        model = nn.Module()
        model.register_parameter("fixed", nn.Parameter(torch.ones(2), requires_grad=False))
        model.register_parameter("absent", None)
    assert not model.fixed.requires_grad
    assert model.absent is None
