"""An unchanged oslo.messaging program, both ends in one process: only the URL says that there is no broker."""

import oslo_messaging
from oslo_config import cfg


class Compute:
    """An endpoint as OpenStack services have them."""

    target = oslo_messaging.Target(version="1.0")

    def __init__(self, host: str) -> None:
        self.host = host

    def get_uptime(self, ctxt: dict, unit: str) -> str:
        return f"{self.host} is up for 5 {unit}, says {ctxt['user']}"

    def refresh(self, ctxt: dict) -> None:
        print(f"{self.host} refreshes\n", end="", flush=True)  # one write: several threads print


conf = cfg.ConfigOpts()
conf([], project="example")
transport = oslo_messaging.get_rpc_transport(conf, url="zmq://")
servers = []
for host in ("host-1", "host-2"):
    target = oslo_messaging.Target(topic="compute", server=host)
    servers.append(oslo_messaging.get_rpc_server(transport, target, [Compute(host)]))
    servers[-1].start()

client = oslo_messaging.get_rpc_client(transport, oslo_messaging.Target(topic="compute", version="1.0"), timeout=5)
print(client.prepare(server="host-2").call({"user": "demo"}, "get_uptime", unit="days"))
client.prepare(server="host-1").cast({}, "refresh")
client.prepare(fanout=True).cast({}, "refresh")

for server in servers:
    server.stop()
    server.wait()
transport.cleanup()
