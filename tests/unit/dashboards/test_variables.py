from __future__ import annotations

import pytest

from hopescale.dashboards.variables import Span


@pytest.mark.parametrize(
    ("promql", "expected"),
    [
        ("rate(x[$__rate_interval])", "rate(x[60000ms])"),
        ("increase(x[$__range:$__interval])", "increase(x[3600000ms:15000ms])"),
        ("x[${__range}]", "x[3600000ms]"),
        ('x{run=~"$run"}', 'x{run=~"a|b"}'),
        ('x{node=~"$node"}', 'x{node=~".*"}'),
    ],
)
def test_variables_are_those_of_grafana(promql: str, expected: str) -> None:
    assert Span(0, 3600, 15, 15, {"run": ["a", "b"]}).substitute(promql) == expected


def test_the_window_of_rates_is_wider_than_a_step() -> None:
    assert Span(0, 3600, 300, 15).substitute("$__rate_interval") == "315000ms"


def test_a_value_matches_itself_alone() -> None:
    span = Span(0, 3600, 15, 15, {"run": ['a.b|c"d\\e']})
    assert span.substitute('x{run=~"$run"}') == r'x{run=~"a\\.b\\|c\"d\\\\e"}'


def test_a_variable_of_no_dashboard_is_an_error() -> None:
    with pytest.raises(KeyError, match="job"):
        Span(0, 3600, 15, 15).substitute('x{job="$job"}')
