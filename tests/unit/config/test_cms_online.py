from __future__ import annotations

import pytest
import yaml

from hopescale.config.compose import load_config, to_yaml, validate
from hopescale.errors import ConfigError

ONLINE = "model.cms.mode=online"


@pytest.mark.parametrize("option", ["cms_online", "cms_online_sparse"])
def test_the_two_ends_of_the_ablation_differ_in_their_periods_alone(option: str) -> None:
    config, other = load_config([f"model={option}"]), load_config(["model=cms_online"])
    assert config.model.cms.mode == "online"
    assert {level.period for level in config.model.cms.levels} == {1 if option == "cms_online" else 512}
    levels = tuple(level.model_copy(update={"period": 1}) for level in config.model.cms.levels)
    cms = config.model.cms.model_copy(update={"levels": levels})
    assert config.model.model_copy(update={"cms": cms}) == other.model


def test_settings_survive_yaml() -> None:
    settings = "model.cms.online={teach_scale: 0.0, warmup_steps: 3, decay_start: 5, decay_end: 9}"
    config = load_config([ONLINE, settings, "model.cms.levels=[{period: 2, teach_scale: 0.3}]"])
    assert config.model.cms.online.decay_end == 9
    assert validate(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("overrides", "field", "words"),
    [
        (["model.cms.online.teach_scale=0.2"], "model.cms.online", "is ignored with cms.mode=frame_mask"),
        (["model.cms.mode=param_period", "model.cms.online.teach_clip=2.0"], "model.cms.online", "param_period"),
        (["model.cms.levels=[{},{teach_scale: 0.1}]"], "model.cms.levels.1.teach_scale", "is ignored with cms.mode"),
        ([ONLINE, "model.cms.levels=[]"], "model.cms.levels", "nothing to teach"),
        ([ONLINE, "model.memory.chunk_size=2"], "model.memory.chunk_size", "must be 1 with cms.mode=online"),
        ([ONLINE, "model.cms.online.decay_start=2"], "model.cms.online", "need each other"),
        ([ONLINE, "model.cms.online={decay_start: 4, decay_end: 4}"], "model.cms.online", "must be in order"),
        (
            [ONLINE, "model.cms.online={warmup_steps: 5, decay_start: 4, decay_end: 9}"],
            "model.cms.online",
            "must be in order",
        ),
        ([ONLINE, "model.cms.online.teach_scale=-1.0"], "model.cms.online.teach_scale", "greater than or equal to 0"),
        ([ONLINE, "model.cms.online.teach_clip=0.0"], "model.cms.online.teach_clip", "greater than 0"),
        ([ONLINE, "model.cms.online.warmup=3"], "model.cms.online.warmup", "warmup_steps"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_refused_by_name(overrides: list[str], field: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    (problem,) = caught.value.problems
    assert problem.field == field
    assert words in str(problem)
