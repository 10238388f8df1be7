"""Servers that hang, and servers that all fail, in short forms; each prints its figures. Long forms: ``make soak``."""

from __future__ import annotations

import pytest
from tests.system import rows
from tests.system.rows import holds

pytestmark = pytest.mark.timeout(240)


def test_a_stopped_process_is_out_of_rotation_in_time_and_soon_back() -> None:
    holds(rows.SHORT_OF_LIVENESS["paused"])


def test_a_server_whose_workers_all_hang_is_out_of_rotation_in_time_and_soon_back() -> None:
    holds(rows.SHORT_OF_LIVENESS["deadlocked"])


def test_retries_of_what_is_unknown_add_little_load_when_all_servers_die() -> None:
    holds(rows.SHORT_OF_LIVENESS["killing"])


def test_retries_of_what_was_refused_add_little_load_when_all_servers_refuse() -> None:
    holds(rows.SHORT_OF_LIVENESS["refusing"])
