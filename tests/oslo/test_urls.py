"""Transport URLs: what each says, the sentence for each that cannot be, and one real registry of every scheme."""

from __future__ import annotations

import logging
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import oslo_messaging
import pytest
from oslo_config import cfg
from oslo_messaging.transport import InvalidTransportURL
from tests.registry.etcd_server import Etcd
from tests.registry.servers import Redis, Sentinels, Server, free_port
from tests.registry.zookeeper_server import ZooKeeper

from onehop import Node
from onehop.oslo import options
from onehop.oslo.driver import ListenFailed

SECRET = "se/cr@t:?#,%"
ADDRESSES = "127.0.1."


def values_of(url: str, **configured: Any) -> dict[str, Any]:
    """The values of all options, as the driver reads them."""
    conf = cfg.ConfigOpts()
    conf.register_opts(options.OPTIONS, group=options.GROUP)
    for name, value in configured.items():
        conf.set_override(name, value, options.GROUP)
    driver = oslo_messaging.get_rpc_transport(conf, url)._driver
    return options.read(driver.conf, driver._url)


def refusal(url: str, **configured: Any) -> str:
    """The sentence with which ``url`` is refused when its transport is made; no password is in it, nor in its cause."""
    with pytest.raises(InvalidTransportURL) as caught:
        values_of(url, **configured)
    told = [str(caught.value), repr(caught.value), caught.value.url, *traceback.format_exception(caught.value)]
    assert not [each for each in told if "secret" in each or quote(SECRET, "") in each or SECRET in each]
    return str(caught.value)


# What a URL says ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "registry", "realm"),
    [
        ("zmq://", None, None),
        ("zmq:", None, None),
        ("zmq:///cell1", None, "cell1"),
        ("zmq:///?realm=cell1", None, "cell1"),
        ("zmq+local://", "local:///", None),
        ("zmq+redis://h1", "redis://h1/", None),
        ("ZMQ+Redis://h1/", "redis://h1/", None),
        ("zmq+redis://h1:6380,h2,10.0.0.3:6381/cell1", "redis://h1:6380,h2,10.0.0.3:6381/", "cell1"),
        ("zmq+redis://[2001:db8::1]:6380,[::1]/cell1", "redis://[2001:db8::1]:6380,[::1]/", "cell1"),
        ("zmq+redis://me:secret@h1:6379/", "redis://me:secret@h1:6379/", None),
        ("zmq+redis://:secret@h1/", "redis://:secret@h1/", None),
        ("zmq+redis://me@h1/", "redis://me@h1/", None),
        ("zmq+redis://me:secret@h1,me:secret@[::1]:7/c", "redis://me:secret@h1,[::1]:7/", "c"),
        ("zmq+redis://me:secret@h1,h2/c", "redis://me:secret@h1,h2/", "c"),
        (f"zmq+redis://m%40e:{quote(SECRET, '')}@h1/", f"redis://m%40e:{quote(SECRET, '')}@h1/", None),
        ("zmq+redis://h1/cell1?db=3&tls=1&ca=/etc/ca.pem", "redis://h1/?db=3&tls=1&ca=%2Fetc%2Fca.pem", "cell1"),
        ("zmq+redis://s1:26379,s2/?sentinel=main", "redis://s1:26379,s2/?sentinel=main", None),
        ("zmq+redis://h1/?realm=cell1&db=3", "redis://h1/?db=3", "cell1"),
        ("zmq+redis://h1/cell1?realm=cell1", "redis://h1/", "cell1"),
        ("zmq+redis://h1/%C3%BCber%20all", "redis://h1/", "über all"),
        ("zmq+etcd://me:secret@e1:2379,me:secret@e2/c?prefix=/x", "etcd://me:secret@e1:2379,e2/?prefix=%2Fx", "c"),
        ("zmq+zookeeper://z1,z2:2182/c?prefix=onehop", "zookeeper://z1,z2:2182/?prefix=onehop", "c"),
        ("zmq+hosts://ctl1,ctl2:9502,[2001:db8::7]/c?insecure=1", "hosts://ctl1,ctl2:9502,[2001:db8::7]/", "c"),
        ("zmq+file:///etc/onehop/peers.toml", "file:///etc/onehop/peers.toml", None),
        ("zmq+file:///etc/one%20hop/peers.toml?realm=c", "file:///etc/one%20hop/peers.toml", "c"),
    ],
)
def test_a_url_names_the_registry_and_the_realm(url: str, registry: str | None, realm: str | None) -> None:
    values = values_of(url)
    assert (values["registry"], values["realm"]) == (registry, realm)


def test_the_query_is_shared_by_the_options_of_the_group_and_those_of_the_registry() -> None:
    url = "zmq+redis://h1/c?lease=4&db=2&insecure=true&ports=9600-9610&cast_ttl=5&tls=1&address=10.0.0.0/16&relay=no"
    values = values_of(url, lease=9.0, subset=20, insecure=False)
    assert values["registry"] == "redis://h1/?db=2&tls=1"
    told = {name: values[name] for name in ("lease", "insecure", "ports", "cast_ttl", "address", "relay", "subset")}
    assert told == {
        "lease": 4.0, "insecure": True, "ports": "9600-9610", "cast_ttl": 5.0, "address": "10.0.0.0/16", "relay": False,
        "subset": 20,
    }  # fmt: skip


def test_options_become_settings_of_the_node() -> None:
    url = "zmq+redis://h1/c?lease=4&insecure=true&ports=9600-9610&idle_timeout=9&subset=7&fanout_direct=50&relay=false"
    more = {"advertise": "192.0.2.1", "cache_directory": "none", "zone": "az1", "host": "compute-1"}
    settings = options.node_of(values_of(url, **more)).settings
    assert (settings.registry, settings.realm, settings.lease, settings.insecure) == ("redis://h1/", "c", 4.0, True)
    assert (settings.ports, settings.idle_timeout, settings.subset) == ("9600-9610", 9.0, 7)
    assert (settings.fanout_direct, settings.relay) == (50, False)
    assert {name: getattr(settings, name) for name in more} == more


def test_what_neither_says_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEHOP_LEASE", "3")
    monkeypatch.setenv("ONEHOP_REGISTRY", "redis://h9/")
    monkeypatch.setenv("ONEHOP_REALM", "elsewhere")
    plain = options.node_of(values_of("zmq://")).settings
    assert (plain.lease, plain.registry, plain.realm) == (3.0, "redis://h9/", "elsewhere")
    named = options.node_of(values_of("zmq+etcd://e1/cell1?lease=5")).settings
    assert (named.lease, named.registry, named.realm) == (5.0, "etcd://e1/", "cell1")


def test_the_registry_of_the_url_wins_over_that_of_the_options_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "onehop.oslo"):
        assert values_of("zmq+etcd://e1/", registry="redis://me:secret@h1/")["registry"] == "etcd://e1/"
    assert "registry = redis://me:***@h1/ of [oslo_messaging_zmq] does not count for zmq+etcd://e1/" in caplog.text
    assert values_of("zmq://", registry="redis://me:secret@h1/")["registry"] == "redis://me:secret@h1/"


def test_the_realm_of_the_url_wins_over_that_of_the_options() -> None:
    assert values_of("zmq:///cell1", realm="cell2")["realm"] == "cell1"
    assert values_of("zmq://", realm="cell2")["realm"] == "cell2"


def test_no_option_of_ours_has_the_name_of_one_of_a_registry() -> None:
    for scheme in ("redis", "etcd", "zookeeper"):
        told = refusal(f"zmq+{scheme}://h1/?no_such=1")
        theirs = told.partition("no option 'no_such'; there are: ")[2].partition(";")[0].split(", ")
        assert {"tls", "ca", "cert", "key"} <= set(theirs)
        assert set(theirs).isdisjoint(options.NAMES)


# What cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("zmq://controller:9501/", "takes no host names: write zmq:// or zmq:///realm, or zmq+hosts://"),
        ("zmq://me:secret@controller/", "zmq://me:***@controller/"),
        ("zmq+redis://", "it names no server; it must look like redis://host1:6379,host2:6379/"),
        ("zmq+redis:///cell1", "it names no server"),
        ("zmq+redis://me:secret@/", "it names no server"),
        ("zmq+redis://:6379/", "':6379' names no host"),
        ("zmq+redis://h1, h2/", "' h2' names no host"),
        ("zmq+etcd://", "it must look like etcd://host1:2379,host2:2379/"),
        ("zmq+zookeeper://", "it must look like zookeeper://host1:2181,host2:2181/"),
        ("zmq+zookeeper://me@z1/", "user:password, with both"),
        ("zmq+consul://me:secret@h1/", "begins with: etcd, file, hosts, local, redis, zookeeper"),
        ("zmq+://h1/", "begins with: etcd, file, hosts, local, redis, zookeeper"),
        ("zmq+hosts:///cell1", "it must look like hosts://host1:9501,host2:9501/"),
        ("zmq+hosts://h1/?tls=1", "it has no option 'tls'; there are: none"),
        ("zmq+file:", "it names no file, as in zmq+file:///etc/onehop/peers.toml"),
        ("zmq+file://h1/peers.toml", "it must look like file:///etc/onehop/peers.toml"),
        ("zmq+file://me:secret@h1/peers.toml", "it must look like file:///etc/onehop/peers.toml"),
        ("zmq+file:///peers.toml?tls=1", "it must look like file:///etc/onehop/peers.toml"),
        ("zmq+local://h1/", "it must be 'local' alone"),
        ("zmq+redis://h1:0/", "'0' in 'h1:0' is no port (1 to 65535)"),
        ("zmq+redis://me:secret@h1:99999/", "'99999' in 'h1:99999' is no port (1 to 65535)"),
        ("zmq+redis://h1:6379//cell1", "the realm is '/cell1': it has no '/'"),
        ("zmq+redis://h1:6379/%2F", "the realm is '/': it has no '/'"),
        ("zmq+redis://h1/cell1/?db=1", "the realm is 'cell1/': it has no '/'"),
        ("zmq+redis://h1/cell1&db=1", "options stand behind a '?', as in zmq+redis://host/realm?lease=6"),
        ("zmq+redis://h1?db=1/cell1", "db is '1/cell1'; it must be a database's number"),
        ("zmq+redis://h1/?tls=yes", "tls is 'yes'; it must be 0 or 1"),
        ("zmq+redis://h1/cell1?realm=cell2", "it names two realms, 'cell1' and 'cell2'"),
        ("zmq+redis://me:secret@h1,you:secret@h2/", "different users or passwords"),
        ("zmq+redis://me:secret@h1,me:secret2@h2/", "write the same before each host"),
        ("zmq+redis://h1/?registry=etcd%3A%2F%2Fme%3Asecret%40e1", "it names two registries"),
        ("zmq://?registry=redis%3A%2F%2Fme%3Asecret%40h1%2F%3Fdb%3Dx", "db is 'x'"),
        ("zmq://?registry=nowhere%3A%2F%2F", "registry is 'nowhere://'; it must be"),
        (f"zmq+redis://me:{quote(SECRET, '')}@h1:70000/", "zmq+redis://me:***@h1:70000/"),
        ("zmq:///?cast_ttl=soon", "a value in the query does not fit its option: "),
        ("zmq:///?outbox_messages=-1", "a value in the query does not fit its option: "),
        ("zmq+redis://h1/?insecure=perhaps", "a value in the query does not fit its option: "),
        ("zmq+redis://h1/?lease=-1", "lease is -1.0; it must be a number of seconds above 0"),
        ("zmq:///" + "x" * 256, "realm is longer than 255 bytes"),
        ("zmq:///?db=1", "no option is called 'db'; there are: registry, realm, host"),
    ],
)
def test_a_url_that_cannot_be_gets_one_sentence_when_the_transport_is_made(url: str, words: str) -> None:
    assert words in refusal(url)


def test_an_unknown_option_is_told_with_those_of_both_kinds() -> None:
    told = refusal("zmq+redis://me:secret@h1/cell1?sentinal=main&lease=6")
    assert "it has no option 'sentinal'; there are: db, sentinel, tls, ca, cert, key" in told
    assert "the query may hold options of [oslo_messaging_zmq] too: registry, realm, host, run_directory" in told
    assert "too:" not in refusal("zmq+redis://h1/cell1?db=x")  # here that is not the point


def test_a_password_in_the_query_is_refused_without_being_shown() -> None:
    assert "it has no option 'password'" in refusal("zmq+redis://h1/?password=secret")


def test_a_wrong_option_of_the_file_is_told_when_the_transport_is_made() -> None:
    assert "registry is 'redis://me:***@h1/?db=x': db is 'x'" in refusal(
        "zmq://", registry="redis://me:secret@h1/?db=x"
    )
    assert "idle_timeout is 0.0" in refusal("zmq://", idle_timeout=0.0)


def test_the_registry_of_the_options_is_not_logged() -> None:
    (option,) = [each for each in options.OPTIONS if each.dest == "registry"]
    assert option.secret


# Real registries ------------------------------------------------------------------------------------------------------


def start_redis(stack: ExitStack) -> str:
    return stack.enter_context(Redis("--requirepass", SECRET)).url().replace("://", f"://:{quote(SECRET, '')}@")


def start_sentinels(stack: ExitStack) -> str:
    return stack.enter_context(Sentinels()).url()


def start_etcd(stack: ExitStack) -> str:
    return stack.enter_context(Etcd()).url()


def start_zookeeper(stack: ExitStack) -> str:
    return stack.enter_context(ZooKeeper()).url()


def start_hosts(stack: ExitStack) -> str:
    port = free_port()
    return f"hosts://{ADDRESSES}1:{port},{ADDRESSES}2:{port}/?ports={port}-{port + 30}"


def start_file(stack: ExitStack) -> str:
    port = free_port()
    path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "peers.toml")
    path.write_text("".join(f'[[hosts]]\nname = "h{each}"\naddress = "{ADDRESSES}{each}"\n' for each in (1, 2)))
    return f"file://{path}?ports={port}-{port + 30}"


@pytest.fixture(
    params=[start_hosts, start_file, start_redis, start_sentinels, start_etcd, start_zookeeper], scope="module"
)
def registry(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a registry that runs."""
    with ExitStack() as stack:
        yield request.param(stack)


class Host:
    """What makes a process one of another host: an address, and a run directory, so that only TCP leads to it."""

    def __init__(self, name: str, address: str, directory: str) -> None:
        self.name, self.address, self.directory = name, address, directory

    def url(self, registry: str, realm: str = "", **more: Any) -> str:
        place, _, query = registry.partition("?")
        given = {"host": self.name, "address": self.address, "run_directory": self.directory, "cache_directory": "none"}
        given |= more
        if place.startswith("file:"):
            given["realm"] = realm
        else:
            place += realm
        parts = [*(f"{name}={value}" for name, value in given.items()), *filter(None, [query])]
        return f"zmq+{place}?{'&'.join(parts)}"


@pytest.fixture
def hosts(run_directory: str) -> Callable[[str], Host]:
    """``hosts(name)`` is another host: the first and the second are those that the registries on hosts list."""
    numbers = count(1)
    return lambda name: Host(name, f"{ADDRESSES}{next(numbers)}", f"{run_directory}/{name}")


class Heard:
    """An endpoint for notifications."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def info(self, ctxt: Any, publisher: str, event: str, payload: Any, metadata: Any) -> None:
        self.seen.append(payload)


def test_calls_casts_and_fan_outs_go_from_host_to_host(
    bus: Any, start: Callable[..., Any], hosts: Callable[..., Host], registry: str, eventually: Callable[..., Any]
) -> None:
    servers = {name: start("serve", server=name, url=hosts(name).url(registry, "smoke")) for name in ("h1", "h2")}
    for each in servers.values():
        assert each.line(60)["ready"]
    transport = bus.transport(hosts("client").url(registry, "smoke"))
    client = bus.client("compute", transport, timeout=60)
    assert client.call({}, "echo", value={"a": [1, None, "ü"]}) == {"a": [1, None, "ü"]}
    for name, each in servers.items():
        assert client.prepare(server=name).call({}, "pid") == each.pid
        client.prepare(server=name).cast({}, "note", value=f"to {name}")
        eventually(lambda name=name, each=each: f"to {name}" in each.ran())
    bus.client("compute", transport, fanout=True).cast({}, "note", value="to all")
    for each in servers.values():
        eventually(lambda each=each: "to all" in each.ran())
    node = transport._driver.core.node
    (record,) = [each for each in node.nodes() if each.host == "h1"]
    assert any(each.startswith(f"tcp://{ADDRESSES}1:") for each in record.endpoints)
    servers["h1"].kill()
    servers["h1"].wait()
    # A call that is sent before the end of the connection was heard ends as one of which nobody knows.
    eventually(lambda: [each.host for each in node.statistics().peers if each.state == "ready"] == ["h2"])
    assert {client.call({}, "pid") for _ in range(4)} == {servers["h2"].pid}


def test_notifications_go_from_host_to_host(
    bus: Any, hosts: Callable[..., Host], registry: str, eventually: Callable[..., Any]
) -> None:
    heard = Heard()
    listening, sending = (
        oslo_messaging.get_notification_transport(cfg.ConfigOpts(), hosts(name).url(registry, "notes"))
        for name in ("h1", "h2")
    )
    target = oslo_messaging.Target(topic="notifications")
    listener = oslo_messaging.get_notification_listener(listening, [target], [heard], executor="threading")
    listener.start()
    notifier = oslo_messaging.Notifier(sending, "nova", driver="messagingv2", topics=["notifications"])
    for number in range(5):
        notifier.info({}, "event", number)
    eventually(lambda: sorted(heard.seen) == list(range(5)))
    listener.stop()
    listener.wait()
    listening.cleanup()
    sending.cleanup()


def test_two_realms_on_one_registry_never_see_each_other(
    bus: Any, hosts: Callable[..., Host], registry: str, eventually: Callable[..., Any]
) -> None:
    class Says:
        def __init__(self, what: str) -> None:
            self.what = what

        def who(self, ctxt: Any) -> str:
            return self.what

    here = hosts("h1")
    for realm in ("blue", "green", ""):
        bus.serve("compute", Says(realm), server="h1", transport=bus.transport(here.url(registry, realm)))
    bus.serve("only-blue", Says("blue"), server="h1", transport=bus.transport(here.url(registry, "blue")))
    there = hosts("h2")
    for realm in ("blue", "green", ""):
        transport = bus.transport(there.url(registry, realm))
        assert {bus.client("compute", transport, timeout=60).call({}, "who") for _ in range(4)} == {realm}
        nodes = transport._driver.core.node.nodes
        theirs = {"openstack/compute", "openstack/only-blue"} if realm == "blue" else {"openstack/compute"}
        eventually(lambda nodes=nodes, theirs=theirs: {each for one in nodes() for each in one.services} == theirs)
        if realm != "blue":
            with pytest.raises(oslo_messaging.MessagingTimeout):
                bus.client("only-blue", transport, timeout=1).call({}, "who")


# One of them, in trouble ----------------------------------------------------------------------------------------------


def test_with_the_registry_away_programs_start_calls_wait_and_casts_are_held(
    bus: Any, start: Callable[..., Any], hosts: Callable[..., Host], eventually: Callable[..., Any]
) -> None:
    server: Server = Redis()
    program = start("serve", server="h1", url=hosts("h1").url(server.url()))
    assert program.line(60)["ready"]
    transport = bus.transport(hosts("client").url(server.url()))
    client = bus.client("compute", transport)
    began = time.monotonic()
    with pytest.raises(oslo_messaging.MessagingTimeout):
        client.prepare(timeout=3).call({}, "echo")
    assert 2.9 < time.monotonic() - began < 6
    mandatory = oslo_messaging.TransportOptions(at_least_once=True)
    with pytest.raises(oslo_messaging.MessageUndeliverable):
        bus.client("compute", transport, transport_options=mandatory).cast({}, "note")
    began = time.monotonic()
    for number in range(3):
        client.cast({}, "note", value=number)
    assert time.monotonic() - began < 5
    assert sum(map(len, transport._driver.core.held.values())) == 3
    try:
        server.start()
        eventually(lambda: sorted(program.ran()) == [0, 1, 2], 60)  # threads run them, in whatever order
        assert client.call({}, "echo", value="back") == "back"
    finally:
        server.close()


def test_the_password_is_in_no_error_no_log_and_no_statistics(
    bus: Any, hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack, caplog.at_level(logging.DEBUG):
        url = start_redis(stack)
        right = bus.transport(hosts("h1").url(url))
        wrong = bus.transport(hosts("h2").url(url.replace(quote(SECRET, ""), "wrong-secret")))
        mandatory = oslo_messaging.TransportOptions(at_least_once=True)
        errors = []
        for transport in (right, wrong):
            with pytest.raises(oslo_messaging.MessageUndeliverable) as unserved:
                bus.client("compute", transport, transport_options=mandatory).call({}, "echo")
            errors.append(unserved.value)
        with pytest.raises(Exception, match="password") as refused:
            wrong._driver.listen(oslo_messaging.Target(topic="compute", server="h2"), 1, None)
        errors.append(refused.value)
        node: Node = right._driver.core.node
        told = [caplog.text, repr(node), repr(node.settings), repr(node.statistics())]
        told += [line for each in errors for line in traceback.format_exception(each)]
        assert "redis://:***@127.0.0.1:" in str(errors[0])
    assert not [each for each in told if "wrong-secret" in each or SECRET in each or quote(SECRET, "") in each]


@pytest.mark.parametrize(("consent", "problem"), [("false", "ONEHOP_INSECURE=true"), ("true", "192.0.2.1")])
def test_listening_beyond_this_host_takes_consent(
    bus: Any, hosts: Callable[..., Host], consent: str, problem: str
) -> None:
    url = f"redis://127.0.0.1:{free_port()}/"
    transport = bus.transport(hosts("h1").url(url, address="192.0.2.1", insecure=consent))
    with pytest.raises(ListenFailed, match=problem) as caught:  # with it, all that is wrong is that we lack the address
        transport._driver.listen(oslo_messaging.Target(topic="compute", server="h1"), 1, None)
    assert ("no keys" in str(caught.value)) is (consent == "false")
