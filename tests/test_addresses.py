"""Where a node listens beyond its host, on this machine as it is."""

from __future__ import annotations

import logging
import socket

import pytest

from onehop.addresses import advertised, bracketed, listening_address, listening_ports
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
    assert listening_address(Settings(address=address, insecure=True), [ELSEWHERE]) == address


@pytest.mark.parametrize(("network", "address"), [("127.0.0.0/8", "127.0.0.1"), ("::1/128", "::1")])
def test_in_a_network_it_is_the_address_that_this_host_has_there(network: str, address: str) -> None:
    assert listening_address(Settings(address=network), [ELSEWHERE]) == address


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("203.0.113.0/24", "would not speak from an address in it"),
        ("2001:db8::/64", "would not speak from an address in it"),
        ("localhost", "a name is no address"),
        ("10.0.0.0/99", "or a network"),
        ("0.0.0.0", "nobody can be reached"),
        ("224.0.0.1", "nobody can be reached"),
    ],
)
def test_what_is_no_address_of_this_host_is_refused(address: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem) as raised:
        listening_address(Settings(address=address, insecure=True), [])
    assert address in str(raised.value)


def test_where_none_is_set_it_is_where_the_way_to_the_first_other_host_begins() -> None:
    way = route_to(ELSEWHERE[0])
    towards = [("127.0.0.1", 9501), ELSEWHERE]
    if way is None:
        assert listening_address(Settings(insecure=True), towards) == "127.0.0.1"
    else:
        assert listening_address(Settings(insecure=True), towards) == way
        assert listening_address(Settings(insecure=True), [(way, 9501), ELSEWHERE]) == way
        assert listening_address(Settings(insecure=True), [(way, 9501)]) == way, "there is nobody else"


def test_a_list_of_this_host_alone_may_say_that_it_is_loopback() -> None:
    assert listening_address(Settings(insecure=True), [("127.0.0.3", 9501)]) == "127.0.0.3"
    assert listening_address(Settings(insecure=True), [("::1", 9501)]) == "::1"


def test_hosts_that_no_way_leads_to_are_named() -> None:
    with pytest.raises(SettingsError, match=r"nobody\.invalid: .*; set address \(ONEHOP_ADDRESS\)"):
        listening_address(Settings(insecure=True), [("nobody.invalid", 9501)])
    with pytest.raises(SettingsError, match="there is no other host to reach"):
        listening_address(Settings(insecure=True), [])


def test_beyond_loopback_nothing_listens_without_consent() -> None:
    with pytest.raises(SettingsError, match=r"there are no keys yet.*insecure=True \(ONEHOP_INSECURE=true\)"):
        listening_address(Settings(), [ELSEWHERE])
    with pytest.raises(SettingsError, match=r"10\.9\.8\.7"):
        listening_address(Settings(address="10.9.8.7"), [("127.0.0.1", 1)])


def test_consent_is_told_loudly_and_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "onehop"):
        for _ in range(3):
            listening_address(Settings(address="10.11.12.13", insecure=True), ())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "INSECURE: listening at 10.11.12.13 without keys" in caplog.text


def test_loopback_needs_no_consent_and_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    listening_address(Settings(address="127.0.0.9"), ())
    assert not caplog.records


@pytest.mark.parametrize(("setting", "ports"), [("9501-9564", range(9501, 9565)), ("1024", range(1024, 1025))])
def test_ports_are_a_range_or_one_number(setting: str, ports: range) -> None:
    assert listening_ports(setting) == ports


@pytest.mark.parametrize("setting", ["", "many", "9564-9501", "0-5", "65000-70000", "9501-", "-5", "1-2-3"])
def test_ports_that_are_none_are_refused(setting: str) -> None:
    with pytest.raises(SettingsError, match="such as 9501-9564"):
        listening_ports(setting if setting != "9501-" else "9501-x")


def test_ports_that_the_kernel_gives_to_outgoing_connections_are_refused() -> None:
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first, last = map(int, file.read().split())
    with pytest.raises(SettingsError, match=r"net\.ipv4\.ip_local_reserved_ports"):
        listening_ports(f"{first - 1}-{first}")
    with pytest.raises(SettingsError, match=f"{first} to {last}"):
        listening_ports(str(last))
    assert listening_ports(f"{first - 2}-{first - 1}")


def test_others_are_told_of_the_address_that_is_advertised_and_of_local_endpoints_as_they_are() -> None:
    endpoints = ("ipc:///run/s", "tcp://10.0.0.5:9502")
    assert advertised(endpoints, "") == endpoints
    assert advertised(endpoints, "203.0.113.7") == ("ipc:///run/s", "tcp://203.0.113.7:9502")
    assert advertised(endpoints, "2001:db8::7") == ("ipc:///run/s", "tcp://[2001:db8::7]:9502")
    with pytest.raises(SettingsError, match="must be an IP address"):
        advertised(endpoints, "gateway.example.org")


def test_addresses_of_ipv6_stand_in_brackets() -> None:
    assert (bracketed("::1"), bracketed("10.0.0.1")) == ("[::1]", "10.0.0.1")
