"""The switch between test hosts: carries IP packets from one to another, late, not at all or not always, as it is told.

A program of its own, started by :mod:`onehop.testing.hosts`, so that its delays do not depend on how busy a test is. It
needs no queueing discipline of the kernel (``netem``), no bridge and no packet filter: each host has TUN devices, and
what it sends there is read here, looked up by the address it is for, and written to the device of that host. So two
hosts are as far from each other as in two racks: one that is gone is silent, and no neighbour says so.

It takes orders as JSON over the socket that it is given, and answers each when it is in force. When that socket
closes, for whatever reason, it ends what runs on the hosts, removes their directory, and ends.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import random
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

LARGEST_PACKET = 65_536
LARGEST_ORDER = 1 << 20
PACKETS_A_TURN = 64
"""Read from one device before the next has its turn."""
HIGHEST_PRIORITY = -20
PROCESSES_A_TURN = 200
"""Killed before the first of them is waited for: each takes a descriptor meanwhile."""
_TCP, _SYN, _ACK = 6, 0x02, 0x10


@dataclass(slots=True, eq=False)
class Port:
    """A device of a host, in one of its networks; ``fd`` is negative where it was taken away."""

    host: int
    network: int
    fd: int

    def fileno(self) -> int:
        return self.fd


@dataclass(slots=True)
class Link:
    """What happens to packets of one host for another in one network (one direction), and what did."""

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    cut: bool = False
    last_due: float = 0.0
    packets: int = 0
    octets: int = 0
    lost: int = 0
    attempts: int = 0


class Switch:
    """Carries packets between devices.

    Args:
        control: where orders come from.
        seed: of the generator that chooses what is lost, and how much delays vary.
    """

    def __init__(self, control: socket.socket, seed: int) -> None:
        self._control = control
        self._random = random.Random(seed)
        self._ports: list[Port] = []
        self._by_address: dict[tuple[int, bytes], Port] = {}
        self._links: dict[tuple[int, int, int], Link] = {}
        self._namespaces: dict[int, int] = {}
        self._late: list[tuple[float, int, Port, Link, bytes]] = []
        self._numbers = itertools.count()
        self._orders: dict[str, Callable[..., Any]] = {
            "attach": self._attach,
            "detach": self._detach,
            "impair": self._impair,
            "traffic": self._traffic,
        }

    @property
    def namespaces(self) -> list[int]:
        """Descriptors of the network namespaces of the hosts that are on."""
        return list(self._namespaces.values())

    def run(self) -> None:
        """Carry packets until the socket for orders is closed."""
        while True:
            # Not poll or epoll: they wait whole milliseconds, and delays shall be exact.
            wait = max(0.0, self._late[0][0] - time.monotonic()) if self._late else None
            waiting: list[socket.socket | Port] = [self._control, *self._ports]
            for each in select.select(waiting, (), (), wait)[0]:
                if isinstance(each, Port):
                    self._carry_from(each)
                elif not self._obey():
                    return
            self._deliver_due()

    # Packets ------------------------------------------------------------------------------------------

    def _carry_from(self, source: Port) -> None:
        now = self._deliver_due()  # before what now comes can overtake it
        for _ in range(PACKETS_A_TURN):
            if source.fd < 0:
                return  # an order took it away in this turn
            try:
                packet = os.read(source.fd, LARGEST_PACKET)
            except BlockingIOError:
                return
            except OSError:
                self._remove(source)  # somebody on the host deleted the device
                return
            self._carry(source, packet, now)

    def _carry(self, source: Port, packet: bytes, now: float) -> None:
        is_ipv4 = packet[0] >> 4 == 4
        target = self._by_address.get((source.network, packet[16:20] if is_ipv4 else packet[24:40]))
        if target is None:
            return  # to nobody here
        link = self._link(source.network, source.host, target.host)
        link.packets += 1
        link.octets += len(packet)
        link.attempts += _begins_a_connection(packet, is_ipv4)
        if link.loss and self._random.random() < link.loss:
            link.lost += 1
            return
        late = link.delay + link.jitter * self._random.uniform(-1, 1) if link.delay or link.jitter else 0.0
        link.last_due = due = max(now + late, link.last_due)  # one after the other, however they vary
        if due > now:
            heapq.heappush(self._late, (due, next(self._numbers), target, link, packet))
        else:
            self._deliver(target, link, packet)

    def _deliver_due(self) -> float:
        """Deliver what is not to be later than now; returns this time."""
        now = time.monotonic()
        while self._late and self._late[0][0] <= now:
            _, _, target, link, packet = heapq.heappop(self._late)
            self._deliver(target, link, packet)
        return now

    def _deliver(self, target: Port, link: Link, packet: bytes) -> None:
        if link.cut or target.fd < 0:
            link.lost += 1
            return
        try:
            os.write(target.fd, packet)
        except OSError:  # the device is down
            link.lost += 1

    def _link(self, network: int, source: int, target: int) -> Link:
        link = self._links.get((network, source, target))
        if link is None:
            link = self._links[network, source, target] = Link()
        return link

    # Orders -------------------------------------------------------------------------------------------

    def _obey(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, LARGEST_ORDER, 64)
        if not data:
            return False
        name, keywords = json.loads(data)
        if descriptors:
            keywords["descriptors"] = descriptors
        self._control.sendall(json.dumps(self._orders[name](**keywords)).encode())
        return True

    def _attach(self, host: int, addresses: list[list[str]], descriptors: list[int]) -> None:
        """A host is switched on: its namespace, and one device for each network with its IPv4 and IPv6 addresses."""
        self._namespaces[host], *devices = descriptors
        for network, (of_network, device) in enumerate(zip(addresses, devices, strict=True)):
            self._ports.append(Port(host, network, device))
            for address in of_network:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                self._by_address[network, socket.inet_pton(family, address)] = self._ports[-1]

    def _detach(self, host: int) -> None:
        """A host is switched off. Its addresses are still known, so that attempts to reach it are counted."""
        for port in [each for each in self._ports if each.host == host]:
            self._remove(port)
        os.close(self._namespaces.pop(host))

    def _remove(self, port: Port) -> None:
        self._ports.remove(port)
        os.close(port.fd)
        port.fd = -1

    def _impair(self, changes: dict[str, Any], **which: list[int]) -> None:
        for link in self._chosen(**which):
            for name, value in changes.items():
                setattr(link, name, value)

    def _traffic(self, **which: list[int]) -> list[int]:
        chosen = list(self._chosen(**which))
        return [sum(getattr(link, name) for link in chosen) for name in ("packets", "octets", "lost", "attempts")]

    def _chosen(self, networks: list[int], sources: list[int], targets: list[int]) -> Iterator[Link]:
        for network, source, target in itertools.product(networks, sources, targets):
            if source != target:
                yield self._link(network, source, target)


def _begins_a_connection(packet: bytes, is_ipv4: bool) -> bool:
    """Whether ``packet`` is the first of a TCP connection."""
    protocol, head = (packet[9], (packet[0] & 0x0F) * 4) if is_ipv4 else (packet[6], 40)
    return protocol == _TCP and len(packet) > head + 13 and packet[head + 13] & (_SYN | _ACK) == _SYN


def end_processes(namespace: int) -> None:
    """Kill every process in a network namespace, except the one that calls, and wait until they are gone.

    Args:
        namespace: a descriptor of it.
    """
    while ending := list(itertools.islice(_processes_in(namespace), PROCESSES_A_TURN)):
        for each in ending:
            try:
                signal.pidfd_send_signal(each, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has just ended
        for each in ending:
            ended = select.poll()
            ended.register(each, select.POLLIN)
            ended.poll()
            os.close(each)


def _processes_in(namespace: int) -> Iterator[int]:
    """Descriptors of the processes there: unlike numbers, they never come to mean another process."""
    wanted = os.fstat(namespace)
    for number in filter(str.isdigit, os.listdir("/proc")):
        if int(number) == os.getpid():
            continue
        try:
            process = os.pidfd_open(int(number))
        except OSError:
            continue  # it has ended
        try:
            is_there = os.path.samestat(os.stat(f"/proc/{number}/ns/net"), wanted)
        except OSError:
            is_there = False
        if is_there:
            yield process
        else:
            os.close(process)


def main() -> None:
    """The program: takes the descriptor of its socket, the seed, and the directory that it removes at the end."""
    control, seed, directory = sys.argv[1:]
    try:
        os.setpriority(os.PRIO_PROCESS, 0, HIGHEST_PRIORITY)
    except PermissionError:
        pass  # then packets are late where the machine is busy; they are not lost
    switch = Switch(socket.socket(fileno=int(control)), int(seed))
    try:
        switch.run()
    finally:
        for each in switch.namespaces:
            end_processes(each)
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
