"""The registry on Redis, with real servers."""

from __future__ import annotations

from tests.registry.outages import Outages
from tests.registry.servers import Redis


class TestRedis(Outages):
    server_class = Redis
