from __future__ import annotations

import pytest
from pydantic import ValidationError

from hopescale.metrics.schema import MetricsConfig


def test_default_serves_this_machine_only():
    config = MetricsConfig()
    assert (config.listen, config.port, config.token_file) == ("loopback", 9177, None)


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"every": True}, {"listen": "public"}, {"port": -1}, {"port": 65536}, {"ports": 1}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        MetricsConfig(**wrong)


def test_every_field_is_one_sentence():
    for name, field in MetricsConfig.model_fields.items():
        assert field.description is not None, name
        assert field.description.endswith("."), name
        assert field.description.count(". ") == 0, name
