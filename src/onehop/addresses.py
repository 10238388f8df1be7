"""Where a node listens beyond its host: at which of the host's addresses, and at which ports."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from onehop.errors import SettingsError
from onehop.settings import Settings

_EPHEMERAL, _RESERVED = "/proc/sys/net/ipv4/ip_local_port_range", "/proc/sys/net/ipv4/ip_local_reserved_ports"

_log = logging.getLogger("onehop")


def listening_address(settings: Settings, towards: Sequence[tuple[str, int]]) -> str:
    """The IP address of this host at which others reach it. No packet is sent; names are looked up.

    It is the setting ``address``; or this host's address in it, where it is a network; or, where it is empty, the
    address of the route to the first of ``towards`` that is not this host. Where there is nobody else it is this
    host's own address among them, be it that of loopback if the list says so itself.

    Args:
        towards: hosts (names or IP addresses) and ports, such as the servers of a registry.

    Raises:
        SettingsError: the setting is neither, the host has no address in that network, or no route is found; or others
            could reach the address, and ``insecure`` is not set.
    """
    address = _chosen(settings.address) if settings.address else _on_the_way(towards)
    if not ip_address(address).is_loopback:
        _consent(settings, address)
    return address


def _chosen(text: str) -> str:
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
            f"address is the network {text}, and this host would not speak from an address in it"
            + (f": its way there begins at {found}" if found else ": no way leads there")
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


def _consent(settings: Settings, address: str) -> None:
    if not settings.insecure:
        raise SettingsError(
            f"this node would listen at {address}, and there are no keys yet: whoever reaches it could call it, and "
            "claim to be anybody. Say insecure=True (ONEHOP_INSECURE=true) if that network is trusted"
        )
    _warn(address)


@cache  # once a process
def _warn(address: str) -> None:
    _log.warning(
        "INSECURE: listening at %s without keys, as insecure = true says; whoever reaches this address may call this "
        "node, and claim to be anybody",
        address,
    )


def advertised(endpoints: Sequence[str], address: str) -> tuple[str, ...]:
    """``endpoints`` as others are told of them: those of TCP at ``address``, where one is given.

    Raises:
        SettingsError: it is no IP address (a name would be looked up where all messages wait for the answer).
    """
    if not address:
        return tuple(endpoints)
    try:
        given = ip_address(address)
    except ValueError:
        raise SettingsError(f"advertise is {address!r}; it must be an IP address") from None
    if given.is_unspecified or given.is_multicast:
        raise SettingsError(f"advertise is {address!r}, at which nobody can be reached")
    host = bracketed(str(given))
    return tuple(f"tcp://{host}:{each.rpartition(':')[2]}" if each.startswith("tcp://") else each for each in endpoints)


def bracketed(address: str) -> str:
    """An IP address as it stands in an endpoint."""
    return f"[{address}]" if ":" in address else address


def listening_ports(setting: str) -> range:
    """The ports that ``setting`` (``"9501-9564"``, or one number) names.

    Raises:
        SettingsError: it does not name any, or the kernel may give them to connections that go out. Then a connection
            to a dead server of this host could meet itself, and take the port from the server for good
            (libzmq issue 4588).
    """
    first, _, last = setting.partition("-")
    try:
        ports = range(int(first), int(last or first) + 1)
    except ValueError:
        ports = range(0)
    if not ports or ports[0] < 1 or ports[-1] > 65_535:
        raise SettingsError(f"ports is {setting!r}; it must be a range of TCP ports, such as 9501-9564")
    taken = [port for port in ports if port in _ephemeral() and not _is_reserved(port)]
    if taken:
        raise SettingsError(
            f"ports is {setting!r}, and the kernel gives ports {_ephemeral()[0]} to {_ephemeral()[-1]} to outgoing "
            f"connections: choose others, or reserve these (sysctl net.ipv4.ip_local_reserved_ports={setting})"
        )
    return ports


def _ephemeral() -> range:
    first, last = _read(_EPHEMERAL, "32768 60999").split()
    return range(int(first), int(last) + 1)


def _is_reserved(port: int) -> bool:
    for each in _read(_RESERVED, "").split(","):
        first, _, last = each.strip().partition("-")
        if first and int(first) <= port <= int(last or first):
            return True
    return False


def _read(path: str, otherwise: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return otherwise
