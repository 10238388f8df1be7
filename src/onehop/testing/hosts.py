"""Hosts for tests: several on this machine, each with a network of its own, and a network between them to be disturbed.

::

    with Hosts(3) as hosts:
        server = hosts[0].start([sys.executable, "server.py"])
        hosts.delay(0.01)                   # 10 ms each way
        hosts.loss(0.05)                    # one packet in twenty
        hosts.cut(hosts[0], hosts[1])       # they cannot reach each other
        hosts.heal()
        hosts.power_off(hosts[0])           # silence: no FIN, no RST, and no process lives on
        hosts.power_on(hosts[0], address="10.1.0.77")

A host is a network namespace without a name, so that nothing is left when the process that made it ends, however it
ends: the kernel removes namespaces, devices and addresses, the switch (:mod:`onehop.testing.switch`) the processes and
files. No packet reaches a network of the machine. All hosts share its files and its clock; that each has a run
directory of its own is what :attr:`Host.environment` is for.

Needs Linux and root; elsewhere :class:`HostsUnavailable` says what is missing. In pytest: the fixture
``onehop_hosts``. From the command line: ``onehop demo --hosts 5``.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

from onehop.errors import OnehopError
from onehop.settings import ENVIRONMENT_PREFIX, Settings
from onehop.testing import switch

MOST_HOSTS = 400
"""The switch waits with select(2), for 1,023 descriptors at most."""
PREFIX, PREFIX6 = 16, 64
"""Lengths of the networks' prefixes."""
QUEUE = 10_000
"""Packets that a device holds for the switch: losses shall be those that were asked for."""
PATIENCE = 30.0
"""Seconds that the switch, or the kernel, may take to obey."""

_CLONE_NEWNET = 0x4000_0000
# Requests of ioctl(2): netdevice(7), and linux/if_tun.h for most architectures.
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFTXQLEN, _TUNSETIFF = 0x8914, 0x8916, 0x891C, 0x8943, 0x400454CA
_IFF_UP, _IFF_NOARP, _IFF_TUN, _IFF_NO_PI = 0x1, 0x80, 0x1, 0x1000


class HostsUnavailable(OnehopError):
    """This machine or this user cannot have test hosts; the message says why."""


class Traffic(NamedTuple):
    """What was sent.

    Attributes:
        packets: IP packets, lost ones included.
        octets: bytes of these.
        lost: packets that did not arrive: by loss, a cut, or because the host was off.
        attempts: packets that begin a TCP connection. A kernel that hears no answer repeats them, after 1 s at first.
    """

    packets: int
    octets: int
    lost: int
    attempts: int


class Host:
    """One host; made by :class:`Hosts`.

    Attributes:
        index: its place among the hosts.
        name: ``"host-1"`` and so on.
        addresses: its IPv4 address in each network.
        addresses6: its IPv6 address in each network.
        run_directory: for sockets and records of nodes there; removed when the host is switched off, as ``/run`` is.
        cache_directory: survives that.
        is_on: whether it has power.
    """

    def __init__(self, index: int, directory: Path) -> None:
        self.index = index
        self.name = f"host-{index + 1}"
        self.run_directory = str(directory / self.name / "run")
        self.cache_directory = str(directory / self.name / "cache")
        self.addresses: tuple[str, ...] = ()
        self.addresses6: tuple[str, ...] = ()
        self.is_on = False
        self._namespace = -1
        self._processes: list[subprocess.Popen[Any]] = []

    def __repr__(self) -> str:
        return f"<Host {self.name} {' '.join(self.addresses)} {'on' if self.is_on else 'off'}>"

    @property
    def address(self) -> str:
        """Its IPv4 address in the first network."""
        return self.addresses[0]

    @property
    def address6(self) -> str:
        """Its IPv6 address in the first network."""
        return self.addresses6[0]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make a process's nodes nodes of this host, which may listen beyond it."""
        return {
            "ONEHOP_HOST": self.name,
            "ONEHOP_RUN_DIRECTORY": self.run_directory,
            "ONEHOP_CACHE_DIRECTORY": self.cache_directory,
            "ONEHOP_INSECURE": "true",
        }

    def start(self, argv: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
        """Start a program on this host. It is killed when the host is switched off, and at the end.

        Args:
            argv: the program and its arguments.
            env: variables besides those of :attr:`environment`, and of this process but for its settings; they win.
            options: as of :class:`subprocess.Popen`.

        Raises:
            RuntimeError: the host is off.
            OSError: as :class:`subprocess.Popen`.
        """
        with self.inside():
            process = subprocess.Popen(argv, env=self._variables(env), **options)
        self._processes.append(process)
        return process

    def run(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Run a program on this host to its end.

        Args:
            argv, env: as of :meth:`start`.
            options: as of :func:`subprocess.run`.

        Raises:
            RuntimeError: the host is off.
            OSError, subprocess.SubprocessError: as :func:`subprocess.run`.
        """
        with self.inside():
            return subprocess.run(argv, env=self._variables(env), **{"check": False, **options})

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread is on this host: sockets that it makes meanwhile, and processes and threads that it
        starts, are there, and stay there.

        For plain sockets. The sockets of a ZeroMQ context belong to the host in which its I/O thread began, and nodes
        of a process share one: a node needs a process of its own, from :meth:`start`.

        Raises:
            RuntimeError: the host is off.
        """
        if not self.is_on:
            raise RuntimeError(f"{self.name} is off; Hosts.power_on() switches it on")
        with _in_namespace(self._namespace):
            yield

    def close_pipes(self) -> None:
        """Close this process's ends of the pipes to programs that were started."""
        for process in self._processes:
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with suppress(BrokenPipeError):  # what it did not take in while it lived
                        pipe.close()
        self._processes.clear()

    def _variables(self, more: Mapping[str, str] | None) -> dict[str, str]:
        return {**without_settings(os.environ), **self.environment, **(more or {})}


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """These variables but for settings: those are meant for the nodes of whoever starts a run, not for the run's."""
    settings = {ENVIRONMENT_PREFIX + each.name.upper() for each in fields(Settings)}
    return {name: value for name, value in environment.items() if name not in settings}


class Hosts(Sequence[Host]):
    """Test hosts, from the beginning of the block to its end.

    Host ``n`` (from 1) has the addresses ``10.1.0.n`` and ``fd00:0:0:1::n``; in a second network ``10.2.0.n`` and
    ``fd00:0:0:2::n``. Packets do not go from one network to another.

    Args:
        count: how many.
        networks: how many networks each of them is in.
        seed: of what is lost, and of how delays vary.

    Raises:
        HostsUnavailable: at the beginning of the block: the machine cannot, or this user must not.
    """

    def __init__(self, count: int, *, networks: int = 1, seed: int = 0) -> None:
        if not 1 <= count * networks <= MOST_HOSTS:
            raise ValueError(f"{count} hosts in {networks} networks; there may be 1 to {MOST_HOSTS} of both multiplied")
        self._count = count
        self._networks = networks
        self._seed = seed
        self._hosts: list[Host] = []
        self._orders = threading.Lock()
        self._end = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._start_switch(undo)
            for index in range(self._count):
                host = Host(index, self._directory)
                self._hosts.append(host)
                undo.callback(host.close_pipes)
                undo.callback(self._forget, host)
                os.makedirs(host.cache_directory, 0o700)
                self._switch_on(host, index + 1)
            self._end = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()

    def __len__(self) -> int:
        return len(self._hosts)

    @overload
    def __getitem__(self, place: int) -> Host: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Host]: ...
    def __getitem__(self, place: int | slice) -> Host | Sequence[Host]:
        return self._hosts[place]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    # The network --------------------------------------------------------------------------------------

    def delay(
        self,
        seconds: float,
        *,
        jitter: float = 0.0,
        source: Host | None = None,
        to: Host | None = None,
        network: int | None = None,
    ) -> None:
        """Packets arrive later, each way, in the order in which they were sent.

        Args:
            seconds: how much; 0 for no delay.
            jitter: up to so many seconds less or more.
            source, to: only packets that this host sends, or that are for this host.
            network: only in this one, counted from 0.
        """
        if not 0 <= jitter <= seconds:
            raise ValueError(f"a delay of {seconds} s give or take {jitter} s; it must not come below 0")
        self._impair({"delay": seconds, "jitter": jitter}, source, to, network)

    def loss(
        self, fraction: float, *, source: Host | None = None, to: Host | None = None, network: int | None = None
    ) -> None:
        """Packets are lost by chance.

        Args:
            fraction: how many, from 0 to 1.
            source, to, network: as of :meth:`delay`.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"a loss of {fraction}; it must be a part of 1")
        self._impair({"loss": fraction}, source, to, network)

    def cut(self, a: Host, b: Host | None = None, *, one_way: bool = False, network: int | None = None) -> None:
        """Nothing that ``a`` sends arrives at ``b``, nor the other way round; what is under way is lost.

        Args:
            a, b: the hosts; without ``b``, ``a`` and all others.
            one_way: only what ``a`` sends is lost.
            network: only in this one, counted from 0.
        """
        self._cut(True, a, b, one_way, network)

    def heal(self, a: Host | None = None, b: Host | None = None, *, network: int | None = None) -> None:
        """Undo cuts, both ways; delays and losses stay.

        Args:
            a, b: between these; without ``b`` all cuts of ``a``, without both all cuts.
            network: only in this one, counted from 0.
        """
        self._cut(False, a, b, False, network)

    def traffic(self, *, source: Host | None = None, to: Host | None = None, network: int | None = None) -> Traffic:
        """What hosts sent to each other since the beginning.

        Args:
            source, to, network: as of :meth:`delay`.
        """
        return Traffic(*self._order("traffic", **self._which(source, to, network)))

    def attempts(self, *, source: Host | None = None, to: Host | None = None) -> int:
        """How often a TCP connection was begun: :attr:`Traffic.attempts`."""
        return self.traffic(source=source, to=to).attempts

    # Power --------------------------------------------------------------------------------------------

    def power_off(self, host: Host) -> None:
        """The host falls silent at once, without a FIN or RST on any connection; then its processes are killed.

        They have ended when this returns. Its run directory is empty when it is switched on again.

        Raises:
            RuntimeError: it is off.
        """
        if not host.is_on:
            raise RuntimeError(f"{host.name} is off already")
        self._order("detach", host=host.index)
        self._forget(host)
        shutil.rmtree(host.run_directory)

    def power_on(self, host: Host, *, address: str = "") -> None:
        """The host is there again, with nothing running. Cuts, delays and losses are as before.

        Args:
            host: one that is off.
            address: its new IPv4 address in the first network (``10.1.0.0/16``); its other addresses change alike.
                Without one it has those it had.

        Raises:
            RuntimeError: it is on.
            ValueError: the address is another host's, or not of the network.
        """
        if host.is_on:
            raise RuntimeError(f"{host.name} is on already")
        number = _number(address or host.address)
        for other in self._hosts:
            if other is not host and _number(other.address) == number:
                raise ValueError(f"{other.name} has the address {other.address}")
        self._switch_on(host, number)

    def _switch_on(self, host: Host, number: int) -> None:
        host.addresses = tuple(_address(network, number) for network in range(self._networks))
        host.addresses6 = tuple(_address6(network, number) for network in range(self._networks))
        os.mkdir(host.run_directory, 0o700)
        namespace, devices = _namespace(list(zip(host.addresses, host.addresses6, strict=True)))
        host._namespace, host.is_on = namespace, True
        try:
            addresses = list(zip(host.addresses, host.addresses6, strict=True))
            self._order("attach", (namespace, *devices), host=host.index, addresses=addresses)
        finally:
            for device in devices:
                os.close(device)

    def _forget(self, host: Host) -> None:
        """End the processes of a host that has no device any more, and the host with them."""
        if not host.is_on:
            return
        host.is_on = False
        switch.end_processes(host._namespace)
        os.close(host._namespace)
        for process in host._processes:
            process.wait()

    # The switch ---------------------------------------------------------------------------------------

    def _start_switch(self, undo: ExitStack) -> None:
        self._directory = Path(
            tempfile.mkdtemp(prefix="oh-hosts-", dir="/tmp")
        )  # paths of sockets have 107 bytes at most
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(PATIENCE)
        with theirs:
            self._switch = subprocess.Popen(
                [sys.executable, "-IS", switch.__file__, str(theirs.fileno()), str(self._seed), str(self._directory)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the test, which then ends it
            )
        undo.callback(self._stop_switch)

    def _stop_switch(self) -> None:
        self._control.close()
        self._switch.wait(PATIENCE)

    def _order(self, name: str, descriptors: Sequence[int] = (), **keywords: Any) -> Any:
        with self._orders:
            try:
                socket.send_fds(self._control, [json.dumps([name, keywords]).encode()], descriptors)
                answer = self._control.recv(switch.LARGEST_ORDER)
            except (BrokenPipeError, ConnectionResetError):
                answer = b""
        if not answer:
            raise RuntimeError("the switch between the hosts has ended; why is on standard error")
        return json.loads(answer)

    def _cut(self, cut: bool, a: Host | None, b: Host | None, one_way: bool, network: int | None) -> None:
        self._impair({"cut": cut}, a, b, network)
        if not one_way:
            self._impair({"cut": cut}, b, a, network)

    def _impair(self, changes: dict[str, Any], source: Host | None, to: Host | None, network: int | None) -> None:
        self._order("impair", changes=changes, **self._which(source, to, network))

    def _which(self, source: Host | None, to: Host | None, network: int | None) -> dict[str, list[int]]:
        for host in (source, to):
            if host is not None and host not in self:
                raise ValueError(f"{host} is none of these hosts")
        if network is not None and not 0 <= network < self._networks:
            raise ValueError(f"network {network}; these hosts are in {self._networks}, counted from 0")
        everybody = list(range(len(self._hosts)))
        return {
            "sources": everybody if source is None else [source.index],
            "targets": everybody if to is None else [to.index],
            "networks": list(range(self._networks)) if network is None else [network],
        }


# Addresses ----------------------------------------------------------------------------------------


def _address(network: int, number: int) -> str:
    return f"10.{network + 1}.{number >> 8}.{number & 0xFF}"


def _address6(network: int, number: int) -> str:
    return f"fd00:0:0:{network + 1:x}::{number:x}"


def _number(address: str) -> int:
    network = IPv4Network((_address(0, 0), PREFIX))
    number = int(IPv4Address(address)) - int(network.network_address)
    if not 0 < number < network.num_addresses - 1:
        raise ValueError(f"{address} is no address of a host in {network}")
    return number


# The kernel ---------------------------------------------------------------------------------------


@contextmanager
def _in_namespace(namespace: int | None) -> Iterator[None]:
    """The calling thread is in a network namespace, or in a new one."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns() is there from Python 3.12 on

    def enter(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(libc.unshare(_CLONE_NEWNET) if namespace is None else libc.setns(namespace, _CLONE_NEWNET))
        try:
            yield
        finally:
            enter(libc.setns(before, _CLONE_NEWNET))
    finally:
        os.close(before)


def _namespace(addresses: Sequence[tuple[str, str]]) -> tuple[int, list[int]]:
    """A new network namespace with a device for each IPv4 and IPv6 address; their descriptors."""
    step = "a network namespace"
    with ExitStack() as undo:
        try:
            undo.enter_context(_in_namespace(None))
            failed = undo.enter_context(ExitStack())
            namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            failed.callback(os.close, namespace)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                _configure(control, _SIOCSIFFLAGS, "lo", struct.pack("H", _IFF_UP))
                devices = []
                for number, (address, address6) in enumerate(addresses):
                    step = "a TUN device (/dev/net/tun)"
                    devices.append(_device(f"eth{number}"))
                    failed.callback(os.close, devices[-1])
                    step = f"the addresses {address} and {address6}"
                    _set_up(control, f"eth{number}", address, address6)
                    _wait_for(address6)
            failed.pop_all()
        except OSError as error:
            raise HostsUnavailable(
                f"test hosts need Linux, root (CAP_SYS_ADMIN and CAP_NET_ADMIN) and /dev/net/tun; "
                f"here {step} cannot be had: {error}"
            ) from error
    return namespace, devices


def _device(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError:
        os.close(fd)
        raise
    return fd


def _set_up(control: socket.socket, name: str, address: str, address6: str) -> None:
    _configure(control, _SIOCSIFTXQLEN, name, struct.pack("i", QUEUE))
    # Without neighbour discovery, nobody is asked whether he has the IPv6 address already.
    _configure(control, _SIOCSIFFLAGS, name, struct.pack("H", _IFF_UP | _IFF_NOARP))
    mask = IPv4Network((0, PREFIX)).netmask
    for request, value in ((_SIOCSIFADDR, IPv4Address(address)), (_SIOCSIFNETMASK, mask)):
        _configure(control, request, name, struct.pack("HH4s", socket.AF_INET, 0, value.packed))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control6:
        index = socket.if_nametoindex(name)
        packed = socket.inet_pton(socket.AF_INET6, address6)
        fcntl.ioctl(control6, _SIOCSIFADDR, struct.pack("=16sIi", packed, PREFIX6, index))


def _wait_for(address6: str) -> None:
    """Until the kernel takes packets for an IPv6 address in: its route is made after the address, by a thread."""
    deadline = time.monotonic() + PATIENCE
    route = f"{socket.inet_pton(socket.AF_INET6, address6).hex()} 80 "
    while not any(line.startswith(route) for line in Path("/proc/thread-self/net/ipv6_route").read_text().splitlines()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the kernel has made no route to {address6} for {PATIENCE:g} s")
        time.sleep(0.001)


def _configure(control: socket.socket, request: int, name: str, value: bytes) -> None:
    fcntl.ioctl(control, request, struct.pack("16s24s", name.encode(), value))
