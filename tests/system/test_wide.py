"""A fan-out to many of which ten are dead; ``wide.py`` has the programs, and is the long form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.system.beyond import Registry
from tests.system.wide import broken, wide

from onehop.testing.hosts import Hosts

RECEIVERS = 110


@pytest.mark.timeout(240)
def test_fanout_names_the_ten_dead_within_seven_seconds(onehop_hosts: Callable[..., Hosts]) -> None:
    hosts = onehop_hosts(4)
    with Registry("redis", hosts) as registry:
        found = wide(hosts, registry, RECEIVERS, 2)
    for name, each in found.items():
        words = f"{each['seconds']:.2f} s, CPU {each['CPU']:.3f} s, {each['taken']} took it"
        print(f"R17  fan-out to {RECEIVERS}, {name}: {words}")
    assert not broken(found, RECEIVERS)
