from __future__ import annotations

import pytest

from hopescale.addresses import source_address


def test_the_way_to_this_machine_itself_leaves_through_loopback() -> None:
    assert source_address("127.0.0.1", 9) == "127.0.0.1"


def test_where_no_route_leads_is_an_error() -> None:
    with pytest.raises(PermissionError):
        source_address("255.255.255.255", 9)
