"""What is promised beyond one host, between test hosts and with the real server of each registry, in a short form.

``beyond.py`` has the programs, and the long form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from typing import Any

import pytest
from tests.system.beyond import (
    KINDS,
    LOAD,
    MOST_ATTEMPTS,
    SERVER,
    Program,
    Registry,
    broken,
    death,
    joins,
    outage,
    returning,
)
from tests.system.rows import TRIES

from onehop.testing.hosts import Hosts

pytestmark = pytest.mark.timeout(240)

IN_FLIGHT = {"ok", "PeerLost unknown"}


@pytest.fixture
def hosts(onehop_hosts: Callable[..., Hosts]) -> Hosts:
    return onehop_hosts(4)


@pytest.fixture(params=KINDS)
def registry(request: pytest.FixtureRequest, hosts: Hosts) -> Iterator[Registry]:
    with Registry(request.param, hosts) as made:
        yield made


def test_a_server_announced_on_one_host_is_called_from_another_within_half_a_second(hosts, registry) -> None:
    assert joins(hosts, registry, 15)["p50"] < 0.5


def dies(make: Callable[..., Hosts], kind: str, *, power: bool, within: dict[str, float]) -> dict[str, Any]:
    """What one of two servers costs that dies. Its times, ``within`` seconds, have other chances, as those of R18."""
    for _ in range(TRIES):
        hosts = make(4)
        with Registry(kind, hosts) as registry:
            found = death(hosts, registry, power=power)
        assert found["outcomes"].keys() <= IN_FLIGHT, found
        assert found["outcomes"].get("PeerLost unknown", 0) <= 8, found
        late = {name: found[name] for name, limit in within.items() if found[name] >= limit}
        if not late:
            break
        for each in hosts:
            hosts.power_off(each)  # its programs end
    assert not late, found
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_server_costs_only_what_was_under_way(onehop_hosts: Callable[..., Hosts], kind: str) -> None:
    found = dies(onehop_hosts, kind, power=False, within={"last one that suffered began after": 1.0})
    assert found["by the other"] > 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_host_without_power_is_left_alone_and_found_again_under_its_new_address(
    onehop_hosts: Callable[..., Hosts], kind: str
) -> None:
    # Who waits there keeps the others away. All is sent elsewhere once it is known to be silent, after 4 s at most.
    within = {
        "last one that suffered began after": 4.0,
        "last one that suffered ended after": 7.0,
        "new address reached after": 3.0,
    }
    found = dies(onehop_hosts, kind, power=True, within=within)
    assert found["meant for the old one ran at the new one"] == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hosts"])
def test_no_call_fails_while_the_registry_is_away_and_when_it_comes_back_without_its_data(hosts, kind) -> None:
    with Registry(kind, hosts) as registry:
        found = outage(hosts, registry, 5.0, after=9.0)
    assert found["outcomes"].keys() == {"ok"}, found
    assert found["servers known while it was away"] == found["servers known after that"] == 2
    assert found["all listed again after"] < 20.0
    assert found["slowest call"] < 2.0


@pytest.mark.parametrize("kind", ["hosts", "redis"])
def test_callers_of_a_server_that_is_started_again_come_back_in_turn(
    onehop_hosts: Callable[..., Hosts], kind: str
) -> None:
    # Where the machine does other things for a moment, those come together that were due meanwhile: 230 to 320 a
    # second, in a dozen runs. So it gets another chance; the simulation, whose clock is its own, counts 249 at most.
    for _ in range(TRIES):
        hosts = onehop_hosts(4)
        with Registry(kind, hosts) as registry:
            found = returning(hosts, registry, 400, 2, period=2.0)  # as long as the last one's turn: most would meet
        back, attempts = found["all answered again after"], found["most attempts in a second"]
        print(f"R18  restart with 400 callers, {kind}: all back after {back:.1f} s, {attempts:.0f} attempts/s")
        assert not broken(found, within=10.0, most=inf)
        if attempts < MOST_ATTEMPTS:
            break
        for each in hosts:
            hosts.power_off(each)  # its programs end
    assert attempts < MOST_ATTEMPTS


def test_two_realms_of_one_registry_never_see_each_other(hosts, registry) -> None:
    for realm, host in (("north", hosts[1]), ("south", hosts[2])):
        Program(host, registry.url, SERVER, realm, "echo", realm=realm).hear()
    loads = [Program(hosts[3], registry.url, LOAD, "echo", "50", "5", realm=realm) for realm in ("north", "south")]
    for each in loads:
        each.hear()
    for realm, load in zip(("north", "south"), loads, strict=True):
        results = load.ask()["results"]
        assert {each[3] for each in results} == {realm}


def test_a_host_in_two_networks_says_at_which_it_speaks(onehop_hosts, eventually) -> None:
    hosts = onehop_hosts(3, networks=2)
    with Registry("redis", hosts) as registry:
        Program(hosts[1], registry.url, SERVER, "second", "echo", address="10.2.0.0/16").hear()
        load = Program(hosts[2], registry.url, LOAD, "echo", "50", "5")
        load.hear()
        eventually(lambda: hosts.traffic(source=hosts[2], to=hosts[1], network=1).packets > 50)
        assert {each[2] for each in load.ask()["results"]} == {"ok"}
        assert hosts.traffic(source=hosts[2], to=hosts[1], network=0).packets == 0
