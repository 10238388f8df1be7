"""Test hosts: what reaches whom, how late, what is lost, what silence is, and that nothing is left behind."""

from __future__ import annotations

import errno
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from onehop.testing.hosts import Host, Hosts, HostsUnavailable

PORT = 9501
SILENCE = 0.5
"""Seconds in which nothing must come; what does come on this machine comes in a thousandth of that."""
PATIENCE = 30.0
SO_RCVBUFFORCE = 33

Eventually = Callable[..., None]
Begin = Callable[..., Hosts]


@pytest.fixture
def hosts(onehop_hosts: Begin) -> Hosts:
    return onehop_hosts(3)


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    """Sockets that are closed when the test is over."""
    with ExitStack() as opened:
        yield opened


class Post:
    """A UDP socket on a host, bound to all its addresses, that other posts send to."""

    def __init__(self, host: Host, sockets: ExitStack, family: int = socket.AF_INET) -> None:
        self.host, self.family = host, family
        with host.inside():
            self.socket = sockets.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 26)
        self.socket.bind(("", PORT))

    @property
    def address(self) -> str:
        return self.host.address if self.family == socket.AF_INET else self.host.address6

    def send(self, to: Post, data: bytes = b"a letter") -> None:
        self.socket.sendto(data, (to.address, PORT))

    def gets(self, within: float = PATIENCE) -> bytes:
        """The next letter; none is empty."""
        return self.socket.recv(100) if select.select([self.socket], (), (), within)[0] else b""


def post_offices(hosts: Hosts, sockets: ExitStack) -> list[Post]:
    return [Post(each, sockets) for each in hosts]


def heard(hosts: Hosts, sender: Post, *receivers: Post) -> list[bool]:
    """Who hears a letter to each. What the switch has counted has arrived, or never will."""
    before = hosts.traffic(source=sender.host).packets
    for each in receivers:
        sender.send(each)
    deadline = time.monotonic() + PATIENCE
    while hosts.traffic(source=sender.host).packets < before + len(receivers):
        assert time.monotonic() < deadline
    return [bool(each.gets(0)) for each in receivers]


ECHO = """
import socket, sys
with socket.create_server(("", int(sys.argv[1]))) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    while data := connection.recv(100):
        connection.sendall(data)
"""


def echo(host: Host) -> subprocess.Popen[str]:
    """A program that answers one connection with what it is sent."""
    process = host.start([sys.executable, "-c", ECHO, str(PORT)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "listening\n"
    return process


def connected(source: Host, to: Host, sockets: ExitStack) -> socket.socket:
    """A connection to the program, which has answered once."""
    with source.inside():
        connection = sockets.enter_context(socket.create_connection((to.address, PORT), PATIENCE))
    connection.sendall(b"hello")
    assert connection.recv(100) == b"hello"
    return connection


# Being a host ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_each_host_reaches_each_other(hosts: Hosts, sockets: ExitStack, family: int) -> None:
    posts = [Post(each, sockets, family) for each in hosts]
    for sender in posts:
        for receiver in posts:
            sender.send(receiver, sender.host.name.encode())
            assert receiver.gets() == sender.host.name.encode()


def test_hosts_have_names_addresses_and_directories_of_their_own(hosts: Hosts) -> None:
    assert [each.name for each in hosts] == ["host-1", "host-2", "host-3"]
    assert [each.address for each in hosts] == ["10.1.0.1", "10.1.0.2", "10.1.0.3"]
    assert [each.address6 for each in hosts] == ["fd00:0:0:1::1", "fd00:0:0:1::2", "fd00:0:0:1::3"]
    assert len({each.run_directory for each in hosts} | {each.cache_directory for each in hosts}) == 6
    assert all(Path(each.run_directory).is_dir() for each in hosts)


def test_a_program_is_told_where_it_is_unless_it_is_told_otherwise(hosts: Hosts) -> None:
    show = [sys.executable, "-c", "import os; print(os.environ['ONEHOP_HOST'], os.environ['ONEHOP_RUN_DIRECTORY'])"]
    assert hosts[1].run(show, capture_output=True).stdout.decode().split() == ["host-2", hosts[1].run_directory]
    told = hosts[1].run(show, {"ONEHOP_HOST": "another"}, capture_output=True, text=True)
    assert told.stdout.split() == ["another", hosts[1].run_directory]


def test_a_program_is_told_no_settings_of_who_starts_it(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEHOP_REGISTRY", "redis://elsewhere")
    monkeypatch.setenv("ELSE", "told")
    show = [sys.executable, "-c", "import os; print(os.environ.get('ONEHOP_REGISTRY'), os.environ.get('ELSE'))"]
    assert hosts[1].run(show, capture_output=True, text=True).stdout.split() == ["None", "told"]


def test_loopback_is_each_hosts_own(hosts: Hosts, sockets: ExitStack) -> None:
    with hosts[0].inside():
        server = sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
        sockets.enter_context(socket.create_connection(server.getsockname(), PATIENCE))
    with hosts[1].inside(), pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.getsockname(), PATIENCE)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.getsockname(), PATIENCE)


def test_there_is_no_way_out_of_the_hosts_nor_into_them(hosts: Hosts) -> None:
    with hosts[0].inside(), pytest.raises(OSError, match="unreachable") as error:
        socket.create_connection(("192.0.2.1", 80), PATIENCE)
    assert error.value.errno == errno.ENETUNREACH
    here = {name for _, name in socket.if_nameindex()}
    with hosts[0].inside():
        assert {name for _, name in socket.if_nameindex()} >= {"lo", "eth0"}
    assert {name for _, name in socket.if_nameindex()} == here


def test_hosts_with_the_same_addresses_do_not_meet(onehop_hosts: Begin, sockets: ExitStack) -> None:
    here, there = onehop_hosts(2), onehop_hosts(2)
    assert here[1].address == there[1].address
    sender, receiver, namesake = Post(here[0], sockets), Post(here[1], sockets), Post(there[1], sockets)
    sender.send(receiver)
    assert (receiver.gets(), namesake.gets(SILENCE)) == (b"a letter", b"")


SERVER = """
import onehop
node = onehop.Node()
node.serve("box", {"open": lambda: "a letter"})
print("serving", flush=True)
node.run()
"""


def test_nodes_of_two_hosts_do_not_share_a_directory(hosts: Hosts) -> None:
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    server = hosts[0].start([sys.executable, "-c", SERVER], path, stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "serving\n"
    call = [sys.executable, "-m", "onehop", "call", "box", "open"]
    assert "a letter" in hosts[0].run(call, path, capture_output=True, text=True).stdout
    assert "box" in hosts[1].run(call, path, capture_output=True, text=True).stderr


def test_two_networks_are_apart(onehop_hosts: Begin, sockets: ExitStack, eventually: Eventually) -> None:
    hosts = onehop_hosts(2, networks=2)
    assert hosts[1].addresses == ("10.1.0.2", "10.2.0.2")
    assert hosts[1].addresses6 == ("fd00:0:0:1::2", "fd00:0:0:2::2")
    sender, receiver = post_offices(hosts, sockets)

    def arrive() -> list[str]:
        before = hosts.traffic().packets
        for address in hosts[1].addresses:
            sender.socket.sendto(address.encode(), (address, PORT))
        eventually(lambda: hosts.traffic().packets == before + 2, PATIENCE)
        return [each.decode() for each in (receiver.gets(0), receiver.gets(0)) if each]

    assert arrive() == ["10.1.0.2", "10.2.0.2"]
    hosts.cut(hosts[1], network=0)
    assert arrive() == ["10.2.0.2"]
    hosts.heal()
    hosts.cut(hosts[1], network=1)
    assert arrive() == ["10.1.0.2"]
    assert [hosts.traffic(to=hosts[1], network=each).lost for each in (0, 1)] == [1, 1]


# Disturbing the network -----------------------------------------------------------------------------


def test_cut_hosts_do_not_reach_each_other_until_healed(hosts: Hosts, sockets: ExitStack) -> None:
    a, b, c = post_offices(hosts, sockets)
    hosts.cut(hosts[0], hosts[1])
    assert heard(hosts, a, b, c) == [False, True]
    assert heard(hosts, b, a, c) == [False, True]
    hosts.heal(hosts[0], hosts[1])
    assert heard(hosts, a, b) == heard(hosts, b, a) == [True]


def test_a_host_can_be_cut_from_all(hosts: Hosts, sockets: ExitStack) -> None:
    a, b, c = post_offices(hosts, sockets)
    hosts.cut(hosts[0])
    assert heard(hosts, a, b, c) == [False, False]
    assert heard(hosts, b, a, c) == [False, True]
    hosts.heal()
    assert heard(hosts, a, b, c) == [True, True]


def test_one_way_can_be_cut(hosts: Hosts, sockets: ExitStack) -> None:
    a, b, _ = post_offices(hosts, sockets)
    hosts.cut(hosts[0], hosts[1], one_way=True)
    assert heard(hosts, a, b) == [False]
    assert heard(hosts, b, a) == [True]


def test_a_connection_survives_a_short_cut(hosts: Hosts, sockets: ExitStack, eventually: Eventually) -> None:
    echo(hosts[0])
    connection = connected(hosts[1], hosts[0], sockets)
    hosts.cut(hosts[0], hosts[1])
    before = hosts.traffic(source=hosts[1]).lost
    connection.sendall(b"are you there?")
    eventually(lambda: hosts.traffic(source=hosts[1]).lost > before, PATIENCE)
    hosts.heal()
    assert connection.recv(100) == b"are you there?"


def test_delays_are_seen_in_a_round_trip(hosts: Hosts, sockets: ExitStack) -> None:
    echo(hosts[0])
    connection = connected(hosts[1], hosts[0], sockets)

    def round_trip() -> float:
        """The quickest of some: what the network takes, not what this machine is busy with."""
        times = []
        for _ in range(10):
            begun = time.monotonic()
            connection.sendall(b"hello")
            connection.recv(100)
            times.append(time.monotonic() - begun)
        return min(times)

    assert round_trip() < 0.04
    hosts.delay(0.05)
    assert 0.1 <= round_trip() < 0.14
    hosts.delay(0.0, source=hosts[0])
    assert 0.05 <= round_trip() < 0.09
    hosts.delay(0.0)
    assert round_trip() < 0.04


def test_jitter_varies_the_delay(hosts: Hosts, sockets: ExitStack) -> None:
    a, b, _ = post_offices(hosts, sockets)
    hosts.delay(0.05, jitter=0.05)
    times = []
    for _ in range(10):
        begun = time.monotonic()
        a.send(b)
        b.gets()
        times.append(time.monotonic() - begun)
    assert min(times) < 0.05 < max(times)


def test_jitter_keeps_the_order(hosts: Hosts, sockets: ExitStack) -> None:
    a, b, _ = post_offices(hosts, sockets)
    hosts.delay(0.05, jitter=0.05)
    for number in range(100):
        a.send(b, b"%d" % number)
        if number == 50:
            hosts.delay(0.0)
    assert [int(b.gets()) for _ in range(100)] == list(range(100))


def lost_of_a_thousand(hosts: Hosts, sockets: ExitStack) -> int:
    a, b, _ = post_offices(hosts, sockets)
    before = hosts.traffic(source=hosts[0], to=hosts[1])
    for _ in range(1000):
        a.send(b)
    arrived = 0
    while hosts.traffic(source=hosts[0], to=hosts[1]).packets < before.packets + 1000:
        arrived += bool(b.gets(0.01))
    while b.gets(0):
        arrived += 1
    lost = hosts.traffic(source=hosts[0], to=hosts[1]).lost - before.lost
    assert arrived + lost == 1000
    return lost


@pytest.mark.parametrize(("fraction", "least", "most"), [(0.0, 0, 0), (0.2, 150, 250), (1.0, 1000, 1000)])
def test_so_much_is_lost_as_was_asked_for(
    hosts: Hosts, sockets: ExitStack, fraction: float, least: int, most: int
) -> None:
    hosts.loss(fraction, source=hosts[0])
    assert least <= lost_of_a_thousand(hosts, sockets) <= most
    assert hosts.traffic(source=hosts[1]).lost == 0


def test_the_seed_says_what_is_lost(onehop_hosts: Begin) -> None:
    counts = []
    for seed in (1, 1, 2):
        hosts = onehop_hosts(3, seed=seed)
        hosts.loss(0.5, source=hosts[0], to=hosts[1])
        with ExitStack() as sockets:
            counts.append(lost_of_a_thousand(hosts, sockets))
    assert counts[0] == counts[1] != counts[2]


def test_a_connection_lives_through_losses(hosts: Hosts, sockets: ExitStack) -> None:
    echo(hosts[0])
    connection = connected(hosts[1], hosts[0], sockets)
    hosts.loss(0.2)
    for _ in range(20):
        connection.sendall(b"hello")
        assert connection.recv(100) == b"hello"
    assert hosts.traffic().lost > 0


def test_a_burst_arrives_whole(hosts: Hosts, sockets: ExitStack) -> None:
    a, b, _ = post_offices(hosts, sockets)
    for number in range(5000):
        a.send(b, b"%d" % number)
    assert [int(b.gets()) for _ in range(5000)] == list(range(5000))


def test_attempts_to_connect_are_counted_by_who_and_to_whom(
    hosts: Hosts, sockets: ExitStack, eventually: Callable[..., None]
) -> None:
    for _ in range(3):
        with hosts[1].inside(), pytest.raises(ConnectionRefusedError):
            socket.create_connection((hosts[0].address, PORT), PATIENCE)
    with hosts[2].inside(), pytest.raises(ConnectionRefusedError):
        socket.create_connection((hosts[0].address6, PORT), PATIENCE)
    echo(hosts[1])
    connected(hosts[2], hosts[1], sockets)
    counted = hosts.attempts(to=hosts[0]), hosts.attempts(to=hosts[0], source=hosts[1]), hosts.attempts(source=hosts[2])
    # The kernel asks again after a second: one more where the machine did something else for so long.
    assert all(wanted <= found <= wanted + 1 for found, wanted in zip(counted, (4, 3, 2), strict=True)), counted
    assert hosts.attempts(source=hosts[0]) == 0
    hosts.power_off(hosts[0])
    with hosts[1].inside(), pytest.raises(TimeoutError):
        socket.create_connection((hosts[0].address, PORT), SILENCE)
    eventually(lambda: hosts.attempts(to=hosts[0], source=hosts[1]) > counted[1])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda hosts: hosts.loss(1.5),
        lambda hosts: hosts.loss(-0.1),
        lambda hosts: hosts.delay(-1.0),
        lambda hosts: hosts.delay(0.01, jitter=0.02),
        lambda hosts: hosts.delay(0.01, network=1),
        lambda hosts: hosts.loss(0.01, network=-1),
        lambda hosts: hosts.attempts(to=Host(0, Path("/"))),
    ],
)
def test_what_cannot_be_is_refused(hosts: Hosts, wrong: Callable[[Hosts], None]) -> None:
    with pytest.raises(ValueError, match=r"it must|these hosts"):
        wrong(hosts)


def test_a_switch_that_has_ended_is_missed(onehop_hosts: Begin, eventually: Eventually) -> None:
    onehop_hosts(1)  # skips where there can be none
    with Hosts(2) as hosts:
        processes = family(hosts[0])
        hosts._switch.kill()
        with pytest.raises(RuntimeError, match="the switch between the hosts has ended"):
            eventually(lambda: hosts.delay(0.01))
    assert not any(map(runs, processes))
    shutil.rmtree(Path(hosts[0].run_directory).parent.parent)


# Power ----------------------------------------------------------------------------------------------


def test_a_host_without_power_is_silent_and_a_killed_process_is_not(hosts: Hosts, sockets: ExitStack) -> None:
    process = echo(hosts[0])
    connection = connected(hosts[1], hosts[0], sockets)
    process.kill()
    assert connection.recv(100) == b""

    process = echo(hosts[0])
    connection = connected(hosts[1], hosts[0], sockets)
    connection.settimeout(SILENCE)
    hosts.power_off(hosts[0])
    assert process.poll() is not None
    with pytest.raises(TimeoutError):
        connection.recv(100)


FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def family(host: Host) -> list[int]:
    """Two processes, of which one has left the other's session."""
    process = host.start([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True)
    return [process.pid, int(process.stdout.readline())]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_every_process_of_a_host_ends_with_its_power_and_no_other(hosts: Hosts) -> None:
    ending, staying = family(hosts[0]), family(hosts[1])
    assert all(map(runs, ending))
    hosts.power_off(hosts[0])
    assert not any(map(runs, ending))
    assert all(map(runs, staying))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_host_comes_back_at_a_new_address(
    hosts: Hosts, sockets: ExitStack, family: int, eventually: Eventually
) -> None:
    friend = Post(hosts[1], sockets, family)
    old = Post(hosts[0], sockets, family).address
    hosts.power_off(hosts[0])
    hosts.power_on(hosts[0], address="10.1.7.8")
    assert (hosts[0].address, hosts[0].address6, hosts[0].name) == ("10.1.7.8", "fd00:0:0:1::708", "host-1")
    new = Post(hosts[0], sockets, family)
    friend.socket.sendto(b"to the old address", (old, PORT))
    eventually(lambda: hosts.traffic(to=hosts[0]).lost == 1, PATIENCE)
    assert heard(hosts, friend, new) == heard(hosts, new, friend) == [True]
    assert new.gets(SILENCE) == b""


def test_files_of_a_run_do_not_outlast_the_power_and_a_cache_does(hosts: Hosts) -> None:
    (Path(hosts[0].run_directory) / "socket").touch()
    (Path(hosts[0].cache_directory) / "view").touch()
    hosts.power_off(hosts[0])
    hosts.power_on(hosts[0])
    assert os.listdir(hosts[0].run_directory) == []
    assert os.listdir(hosts[0].cache_directory) == ["view"]


def test_a_host_that_comes_back_has_forgotten_its_connections(hosts: Hosts, sockets: ExitStack) -> None:
    echo(hosts[0])
    connection = connected(hosts[1], hosts[0], sockets)
    hosts.power_off(hosts[0])
    hosts.power_on(hosts[0])
    connection.sendall(b"do you remember?")
    with pytest.raises(ConnectionResetError):
        connection.recv(100)


def test_cuts_outlast_the_power(hosts: Hosts, sockets: ExitStack) -> None:
    hosts.cut(hosts[0], hosts[1])
    hosts.power_off(hosts[0])
    hosts.power_on(hosts[0])
    a, b, c = post_offices(hosts, sockets)
    assert heard(hosts, a, b, c) == [False, True]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("10.1.0.2", "host-2 has the address 10.1.0.2"),
        ("10.2.0.1", "no address of a host in 10.1.0.0/16"),
        ("10.1.0.0", "no address of a host in 10.1.0.0/16"),
        ("10.1.255.255", "no address of a host in 10.1.0.0/16"),
        ("host-9", "does not appear to be|[Ee]xpected 4 octets"),
    ],
)
def test_an_address_that_cannot_be_is_refused(hosts: Hosts, address: str, words: str) -> None:
    hosts.power_off(hosts[0])
    with pytest.raises(ValueError, match=words):
        hosts.power_on(hosts[0], address=address)
    hosts.power_on(hosts[0])


def test_power_is_on_or_off(hosts: Hosts) -> None:
    with pytest.raises(RuntimeError, match="host-1 is on already"):
        hosts.power_on(hosts[0])
    hosts.power_off(hosts[0])
    with pytest.raises(RuntimeError, match="host-1 is off already"):
        hosts.power_off(hosts[0])
    for start in (hosts[0].start, hosts[0].run):
        with pytest.raises(RuntimeError, match="host-1 is off"):
            start([sys.executable, "-c", ""])


# The end --------------------------------------------------------------------------------------------


def test_nothing_is_left_at_the_end(onehop_hosts: Begin) -> None:
    onehop_hosts(1)  # skips where there can be none
    descriptors = os.listdir("/proc/self/fd")
    with Hosts(2) as hosts:
        processes = family(hosts[0])
        directory = Path(hosts[0].run_directory).parent.parent
        hosts.power_off(hosts[1])
    assert not any(map(runs, processes))
    assert not directory.exists()
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


CRASHING = """
import os, subprocess, sys
from onehop.testing.hosts import Hosts

with Hosts(2) as hosts:
    process = hosts[0].start([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
    print(process.pid, process.stdout.readline().strip(), hosts._switch.pid, hosts[0].run_directory, flush=True)
    sys.stdin.read()
"""


def test_nothing_is_left_when_the_process_is_killed(onehop_hosts: Begin, eventually: Eventually) -> None:
    onehop_hosts(1)  # skips where there can be none
    with subprocess.Popen(
        [sys.executable, "-c", CRASHING, FAMILY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:
        assert process.stdout is not None
        *pids, run_directory = process.stdout.readline().split()
        assert len(pids) == 3
        assert all(runs(int(each)) for each in pids)
        process.kill()
    eventually(lambda: not any(runs(int(each)) for each in pids), PATIENCE)
    assert not Path(run_directory).parent.parent.exists()


# Where there can be none ----------------------------------------------------------------------------

USING = """
def test_between_hosts(onehop_hosts):
    assert len(onehop_hosts(2)) == 2
"""


def without_the_right(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as a user who must not make network namespaces."""
    drop = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"] if os.geteuid() == 0 else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [*drop, sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def test_who_must_not_is_told_what_is_missing(tmp_path: Path) -> None:
    program = "from onehop.testing.hosts import Hosts\nwith Hosts(2): pass"
    ended = without_the_right("-c", program, cwd=tmp_path)
    sentence = ended.stderr.splitlines()[-1]
    assert HostsUnavailable.__name__ in sentence
    assert "root (CAP_SYS_ADMIN" in sentence
    assert "a network namespace cannot be had" in sentence
    assert "Operation not permitted" in sentence


@pytest.mark.parametrize(("option", "code"), [("-q", 0), ("--onehop-require-hosts", 1)])
def test_the_fixture_skips_loudly_or_fails(tmp_path: Path, option: str, code: int) -> None:
    (tmp_path / "test_it.py").write_text(USING)
    plugin = () if entry_points(group="pytest11", name="onehop") else ("-p", "onehop.testing.plugin")
    ended = without_the_right("-m", "pytest", "-p", "no:cacheprovider", *plugin, option, cwd=tmp_path)
    assert ended.returncode == code, ended.stdout + ended.stderr
    if code:
        assert "1 error" in ended.stdout or "1 failed" in ended.stdout
        assert "HostsUnavailable: test hosts need" in ended.stdout
    else:
        assert "NOT RUN: 1 tests between hosts: test hosts need Linux, root" in ended.stdout


def test_too_many_hosts_are_refused() -> None:
    for count, networks in ((0, 1), (401, 1), (201, 2)):
        with pytest.raises(ValueError, match="there may be 1 to 400"):
            Hosts(count, networks=networks)
