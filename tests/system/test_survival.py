"""What must survive what, in short forms; each prints its figures. The long forms: ``make soak``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.system import rows
from tests.system.rows import PARTITIONS, holds

from onehop.testing.hosts import Hosts

pytestmark = pytest.mark.timeout(240)


def test_a_killed_server_costs_only_what_was_in_flight_there() -> None:
    holds(rows.SHORT["kills"])


def test_no_call_fails_while_all_servers_are_restarted_in_turn() -> None:
    holds(rows.SHORT["rolling"])


def test_serve_ends_at_sigterm_with_everything_answered_that_it_accepted() -> None:
    holds(rows.SHORT["terminated"])


def test_three_times_the_load_is_refused_in_milliseconds_and_leaves_the_goodput() -> None:
    holds(rows.SHORT["overload"])


@pytest.mark.parametrize("kind", PARTITIONS)
def test_a_bad_link_is_noticed_and_the_rate_is_back_soon_after_it_is_whole(
    onehop_hosts: Callable[..., Hosts], kind: str
) -> None:
    hosts = onehop_hosts(4)
    holds(lambda: rows.partition(hosts, kind, rate=300, lasts=8.0))
