"""At which of its addresses a host listens for others."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from onehop.errors import SettingsError
from onehop.settings import Settings


def listening_address(settings: Settings, towards: Sequence[tuple[str, int]]) -> str:
    """The IP address of this host at which others reach it. No packet is sent; names are looked up.

    It is the setting ``address``; or this host's address in it, where it is a network; or, where it is empty, the
    address of the route to the first of ``towards`` that is not this host. Where there is nobody else it is this
    host's own address among them, be it that of loopback if the list says so itself.

    Args:
        towards: hosts (names or IP addresses) and ports, such as the servers of a registry.

    Raises:
        SettingsError: the setting is neither, the host has no address in that network, or no route is found.
    """
    text = settings.address
    if not text:
        return _on_the_way(towards)
    try:
        address = ip_address(text)
    except ValueError:
        return _within(text)
    if address.is_unspecified or address.is_multicast:
        raise SettingsError(f"address is {text!r}, at which nobody can be reached; name one of this host's addresses")
    return str(address)


def _within(text: str) -> str:
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise SettingsError(
            f"address is {text!r}; it must be an IP address of this host, such as 10.0.0.5, or a network in which it "
            f"has one, such as 10.0.0.0/16 (a name is no address: it may mean another one on each host)"
        ) from None
    first = network[1] if network.num_addresses > 2 else network[0]  # the very first of IPv4 is for broadcasts
    found = _source(first, 9)
    if found is None or found not in network:
        raise SettingsError(
            f"address is the network {text}, in which this host has no address"
            + (f" (its way there begins at {found})" if found else "")
            + "; name one that `ip address` shows"
        )
    return str(found)


def _on_the_way(towards: Sequence[tuple[str, int]]) -> str:
    own: list[str] = []
    failures: list[str] = []
    for host, port in towards:
        try:
            found = resolve(host, port)
        except OSError as error:
            failures.append(f"{host}: {error.strerror}")
            continue
        for address in found:
            source = _source(address, port)
            if source is None:
                failures.append(f"{host}: no route to {address}")
            elif address.is_loopback and not (_is_address(host) or host == "localhost"):
                failures.append(f"{host}: means {address} here, which leads nobody else to this host")
            elif address.is_loopback or source == address:
                own.append(str(address))
            else:
                return str(source)
    if own:
        return own[0]
    raise SettingsError(
        "no address of this host is found at which others reach it: "
        + ("; ".join(failures) or "there is no other host to reach")
        + "; set address (ONEHOP_ADDRESS) to one of its addresses, or to a network such as 10.0.0.0/16"
    )


def resolve(host: str, port: int) -> list[IPv4Address | IPv6Address]:
    """The addresses that ``host`` means now, in the system's order. Waits for the system's resolver.

    Raises:
        OSError: it means none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ip_address(str(each[4][0]).partition("%")[0]) for each in found))


def _source(address: IPv4Address | IPv6Address, port: int) -> IPv4Address | IPv6Address | None:
    """The address of this host from which the way to ``address`` begins."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), port))
            return ip_address(str(probe.getsockname()[0]).partition("%")[0])
    except OSError:
        return None


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
