"""The systems under measurement: one line each. Their modules are imported in their own processes only."""

from __future__ import annotations

from benchmarks.system import System

SEQUENTIAL = ("one-caller", "one-caller-free")
LARGE = "large"
PAIRS = "pairs"  # up to 32 processes of each system at once, so not of all
LIMIT = (*SEQUENTIAL, "asyncio-32", "threads-32", LARGE)
AIO_LIMIT = (*SEQUENTIAL, "asyncio-32")
PEER = (*SEQUENTIAL, "threads-32", "quad", LARGE, "memory")
AIO_PEER = (*SEQUENTIAL, "asyncio-32", "quad", PAIRS, "memory")
NATS = (*PEER, "asyncio-32", PAIRS, "cast", "fanout-50")
UVLOOP_NATS = (*SEQUENTIAL, "asyncio-32", "quad", "cast")
ZENOH = (*PEER, PAIRS, "cast", "fanout-50")
ONEHOP = (*PEER, PAIRS, "cast", "fanout-50")
ONEHOP_PURE = (*SEQUENTIAL, "threads-32", "quad")
ONEHOP_ASYNCIO = (*SEQUENTIAL, "asyncio-32", "quad", PAIRS, "cast", "fanout-50", "memory")
ONEHOP_UVLOOP = (*SEQUENTIAL, "asyncio-32", "quad", "cast")
CROWD = ("fanout-1000", "links")
OSLO = "oslo"
RPC = (*SEQUENTIAL, "threads-32", "quad", "pairs", "cast", "fanout-50", "memory", "scale", OSLO)

PURE = {"ONEHOP_PURE": "1"}
"""Without the compiled helper."""
TCP, IPC = {"transport": "tcp"}, {"transport": "ipc"}
UVLOOP = {"uvloop": True}
TASK = {"inline": False}
INLINE, POOL = {"inline": True}, {"inline": False, "workers": 8}
SHARED = {"connections": 1}
PUSH_PULL, PUB_SUB = {"taker": "Puller", "giver": "Pusher"}, {"taker": "Subscriber", "giver": "Publisher"}
MESSAGING = "oslo.messaging"
RABBIT, ZMQ = {"url": "{broker}"}, {"url": "zmq://?run_directory={directory}"}

_TABLE = (
    # --- limits: what remains when nothing is promised
    System("sockets tcp", "limit", "sockets:SocketServer", "sockets:SocketClient", SEQUENTIAL, TCP),
    System("sockets ipc", "limit", "sockets:SocketServer", "sockets:SocketClient", SEQUENTIAL, IPC),
    System("asyncio tcp", "limit", "sockets:AsyncioServer", "sockets:AsyncioClient", AIO_LIMIT, TCP),
    System("asyncio ipc", "limit", "sockets:AsyncioServer", "sockets:AsyncioClient", AIO_LIMIT, IPC),
    System("asyncio uvloop tcp", "limit", "sockets:AsyncioServer", "sockets:AsyncioClient", AIO_LIMIT, TCP | UVLOOP),
    System("asyncio uvloop ipc", "limit", "sockets:AsyncioServer", "sockets:AsyncioClient", AIO_LIMIT, IPC | UVLOOP),
    System("dealer/router bytes tcp", "limit", "limits:Router", "limits:Dealer", LIMIT, TCP | {"codec": False}),
    System("dealer/router bytes ipc", "limit", "limits:Router", "limits:Dealer", LIMIT, IPC | {"codec": False}),
    System("dealer/router tcp", "limit", "limits:Router", "limits:Dealer", LIMIT, TCP),
    System("dealer/router ipc", "limit", "limits:Router", "limits:Dealer", (*LIMIT, "quad", PAIRS, OSLO), IPC),
    System("multipart tcp", "limit", "limits:MultipartRouter", "limits:MultipartDealer", LIMIT, TCP),
    System("multipart ipc", "limit", "limits:MultipartRouter", "limits:MultipartDealer", (*LIMIT, "quad"), IPC),
    System("push/pull tcp", "limit", "limits:Pull", "limits:Push", ("cast",), TCP),
    System("push/pull ipc", "limit", "limits:Pull", "limits:Push", ("cast",), IPC),
    System("neighbour", "limit", "neighbour:Server", "neighbour:Client", ()),
    # --- peers
    System("rpyc", "peer", "rpyc_:Server", "rpyc_:Client", (*PEER, PAIRS), needs="rpyc"),
    System("rpyc, one connection", "peer", "rpyc_:Server", "rpyc_:Client", ("threads-32",), SHARED, needs="rpyc"),
    System("nng", "peer", "nng:Server", "nng:Client", PEER, needs="pynng"),
    System("zenoh", "peer", "zenoh_:Server", "zenoh_:Client", ZENOH, needs="eclipse-zenoh"),
    System("grpc", "peer", "grpc_:Server", "grpc_:Client", PEER, needs="grpcio"),
    System("grpc.aio", "peer", "grpc_:AioServer", "grpc_:AioClient", AIO_PEER, needs="grpcio"),
    System("nats", "peer", "nats:Server", "nats:Client", NATS, broker="nats", needs="nats-py"),
    System("nats uvloop", "peer", "nats:Server", "nats:Client", UVLOOP_NATS, UVLOOP, broker="nats", needs="nats-py"),
    System("zerorpc", "peer", "zerorpc_:Server", "zerorpc_:Client", PEER, needs="zerorpc"),
    System("zerorpc push/pull", "peer", "zerorpc_:Taker", "zerorpc_:Giver", ("cast",), PUSH_PULL, needs="zerorpc"),
    System("zerorpc pub/sub", "peer", "zerorpc_:Taker", "zerorpc_:Giver", ("fanout-50",), PUB_SUB, needs="zerorpc"),
    # --- onehop
    System("onehop inline", "onehop", "onehop_:Server", "onehop_:Client", (*ONEHOP, "scale"), INLINE),
    System("onehop inline pure", "onehop", "onehop_:Server", "onehop_:Client", ONEHOP_PURE, INLINE, environment=PURE),
    System("onehop pool", "onehop", "onehop_:Server", "onehop_:Client", ONEHOP, POOL),
    System("onehop pool pure", "onehop", "onehop_:Server", "onehop_:Client", ONEHOP_PURE, POOL, environment=PURE),
    System("onehop crowd", "onehop", "onehop_crowd:Server", "onehop_crowd:Client", CROWD, INLINE | {"direct": 2_000}),
    System("onehop relays", "onehop", "onehop_crowd:Server", "onehop_crowd:Client", (), INLINE | {"direct": 100}),
    System("onehop asyncio", "onehop", "onehop_asyncio:Server", "onehop_asyncio:Client", ONEHOP_ASYNCIO),
    System("onehop asyncio task", "onehop", "onehop_asyncio:Server", "onehop_asyncio:Client", ("asyncio-32",), TASK),
    System("onehop asyncio uvloop", "onehop", "onehop_asyncio:Server", "onehop_asyncio:Client", ONEHOP_UVLOOP, UVLOOP),
    # --- oslo.messaging
    System("oslo rabbit", "peer", "oslo_:Server", "oslo_:Client", RPC, RABBIT, broker="rabbit", needs=MESSAGING),
    System("oslo zmq", "onehop", "oslo_:Server", "oslo_:Client", RPC, ZMQ, needs=MESSAGING),
    System("oslo zero-cost", "limit", "oslo_:FloorServer", "oslo_:FloorClient", (OSLO,), needs=MESSAGING),
)

SYSTEMS = {each.name: each for each in _TABLE}
