"""At which of its addresses a host listens, on this machine as it is."""

from __future__ import annotations

import socket

import pytest

from onehop.addresses import listening_address
from onehop.errors import SettingsError
from onehop.settings import Settings

ELSEWHERE = ("198.51.100.7", 9501)  # of a network for documentation: nobody is there, but a route may lead there


def route_to(address: str) -> str | None:
    """The address at which this machine's way to another begins."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


@pytest.mark.parametrize("address", ["127.0.0.5", "10.1.2.3", "::1", "2001:db8::5"])
def test_an_address_that_is_set_is_taken(address: str) -> None:
    assert listening_address(Settings(address=address), [ELSEWHERE]) == address


@pytest.mark.parametrize(("network", "address"), [("127.0.0.0/8", "127.0.0.1"), ("::1/128", "::1")])
def test_in_a_network_it_is_the_address_that_this_host_has_there(network: str, address: str) -> None:
    assert listening_address(Settings(address=network), [ELSEWHERE]) == address


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("203.0.113.0/24", "in which this host has no address"),
        ("2001:db8::/64", "in which this host has no address"),
        ("localhost", "a name is no address"),
        ("10.0.0.0/99", "or a network"),
        ("0.0.0.0", "nobody can be reached"),
        ("224.0.0.1", "nobody can be reached"),
    ],
)
def test_what_is_no_address_of_this_host_is_refused(address: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem) as raised:
        listening_address(Settings(address=address), [])
    assert address in str(raised.value)


def test_where_none_is_set_it_is_where_the_way_to_the_first_other_host_begins() -> None:
    way = route_to(ELSEWHERE[0])
    towards = [("127.0.0.1", 9501), ELSEWHERE]
    if way is None:
        assert listening_address(Settings(), towards) == "127.0.0.1"
    else:
        assert listening_address(Settings(), towards) == way
        assert listening_address(Settings(), [(way, 9501), ELSEWHERE]) == way
        assert listening_address(Settings(), [(way, 9501)]) == way, "there is nobody else"


def test_a_list_of_this_host_alone_may_say_that_it_is_loopback() -> None:
    assert listening_address(Settings(), [("127.0.0.3", 9501)]) == "127.0.0.3"
    assert listening_address(Settings(), [("::1", 9501)]) == "::1"


def test_hosts_that_no_way_leads_to_are_named() -> None:
    with pytest.raises(SettingsError, match=r"nobody\.invalid: .*; set address \(ONEHOP_ADDRESS\)"):
        listening_address(Settings(), [("nobody.invalid", 9501)])
    with pytest.raises(SettingsError, match="there is no other host to reach"):
        listening_address(Settings(), [])
