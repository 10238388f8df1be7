"""Where a node listens beyond its host: which of this host's addresses, and which ports."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Sequence
from contextlib import closing
from functools import cache

from onehop.errors import SettingsError
from onehop.settings import Settings

_EPHEMERAL, _RESERVED = "/proc/sys/net/ipv4/ip_local_port_range", "/proc/sys/net/ipv4/ip_local_reserved_ports"
_DISCARD = 9  # a port to name where one is needed; nothing is sent to it

_log = logging.getLogger("onehop")


def listening_address(settings: Settings, towards: Sequence[tuple[str, int]]) -> str:
    """The IP address of this host at which to listen.

    It is ``settings.address``; or, where that is a network, this host's address in it; or, where it is empty, the
    address from which the first of ``towards`` that is not this host itself is reached. No packet is sent to find out.

    Args:
        settings: ``address`` and ``insecure`` are read.
        towards: host (a name or an address) and port of each server of the registry.

    Raises:
        SettingsError: there is no such address; or it is not of the loopback, and ``insecure`` is not set.
    """
    address = _chosen(settings.address) if settings.address else _towards(towards)
    if not ipaddress.ip_address(address).is_loopback:
        _consent(settings, address)
    return address


def _chosen(setting: str) -> str:
    try:
        if "/" not in setting:
            return str(ipaddress.ip_address(setting))
        network = ipaddress.ip_network(setting, strict=False)
    except ValueError:
        raise SettingsError(
            f"address is {setting!r}; it must be an IP address of this host, or a network such as 10.0.0.0/16"
        ) from None
    try:
        found = _source(str(network[min(1, network.num_addresses - 1)]))
    except OSError as error:
        raise SettingsError(f"address is {setting!r}, a network that this host cannot reach: {error}") from None
    if ipaddress.ip_address(found) not in network:
        raise SettingsError(
            f"address is {setting!r}, and this host has no address in that network: it would reach it from {found}"
        )
    return found


def _towards(servers: Sequence[tuple[str, int]]) -> str:
    own, problems = "", []
    for host, _port in servers:
        try:
            for *_, place in socket.getaddrinfo(host, _DISCARD, type=socket.SOCK_DGRAM):
                target = str(place[0])
                found = _source(target)
                if found != target and not ipaddress.ip_address(target).is_loopback:  # else it is this host
                    return found
                if not own or ipaddress.ip_address(own).is_loopback:
                    own = found
        except OSError as error:
            problems.append(f"{host}: {error}")
    if own:
        return own
    raise SettingsError(
        f"no address of this host leads to the registry ({'; '.join(problems)}): set address (ONEHOP_ADDRESS) to "
        "the one at which others reach this host"
    )


def _source(target: str) -> str:
    """The address from which this host would send to ``target``."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        probe.connect((target, _DISCARD))
        return str(probe.getsockname()[0])


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
        host = bracketed(str(ipaddress.ip_address(address)))
    except ValueError:
        raise SettingsError(f"advertise is {address!r}; it must be an IP address") from None
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
