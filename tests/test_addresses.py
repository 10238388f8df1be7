"""Where a node listens beyond its host."""

from __future__ import annotations

import ipaddress
import logging

import pytest

from onehop.addresses import advertised, bracketed, listening_address, listening_ports
from onehop.errors import SettingsError
from onehop.settings import Settings

HERE = "198.51.100.1"  # an address of documentation: no host has it, and packets to it go where all go


def outward() -> str:
    return listening_address(Settings(insecure=True), [(HERE, 1)])


def test_address_is_the_one_from_which_the_registry_is_reached() -> None:
    assert listening_address(Settings(), [("127.0.0.1", 2379)]) == "127.0.0.1"
    assert listening_address(Settings(), [("::1", 2379)]) == "::1"
    assert not ipaddress.ip_address(outward()).is_loopback


def test_a_registry_on_this_very_host_is_passed_over_for_one_on_another() -> None:
    assert listening_address(Settings(insecure=True), [("127.0.0.1", 1), (HERE, 1)]) == outward()
    # What many systems let their own name mean.
    assert listening_address(Settings(insecure=True), [("127.0.1.1", 1), (HERE, 1)]) == outward()


def test_a_server_whose_name_nobody_knows_is_passed_over() -> None:
    assert listening_address(Settings(), [("no-such-host.invalid", 1), ("127.0.0.1", 1)]) == "127.0.0.1"


def test_without_any_way_to_the_registry_the_error_says_what_to_set() -> None:
    with pytest.raises(SettingsError, match=r"no-such-host\.invalid: .*set address \(ONEHOP_ADDRESS\)"):
        listening_address(Settings(), [("no-such-host.invalid", 1)])


@pytest.mark.parametrize(
    ("setting", "address"),
    [("127.0.0.5", "127.0.0.5"), ("127.0.0.0/8", "127.0.0.1"), ("::1", "::1"), ("::1/128", "::1")],
)
def test_address_that_is_set_or_lies_in_the_network_that_is_set_is_taken(setting: str, address: str) -> None:
    assert listening_address(Settings(address=setting), [(HERE, 1)]) == address


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("host-7", "must be an IP address of this host, or a network such as 10.0.0.0/16"),
        ("10.0.0.0/99", "must be an IP address of this host, or a network"),
        ("198.51.100.0/24", "this host has no address in that network|cannot reach"),
    ],
)
def test_address_that_cannot_be_is_refused_and_the_error_says_what_could(setting: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        listening_address(Settings(address=setting, insecure=True), [(HERE, 1)])


def test_beyond_loopback_nothing_listens_without_consent() -> None:
    with pytest.raises(SettingsError, match=r"there are no keys yet.*insecure=True \(ONEHOP_INSECURE=true\)"):
        listening_address(Settings(), [(HERE, 1)])
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
