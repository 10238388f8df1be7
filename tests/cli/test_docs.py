"""The pages say what is so: made pages are current, tables are complete, links lead somewhere, the tutorial runs."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from onehop import Settings, SettingsError, errors
from onehop.protocol.wire import REASONS
from onehop.registry import open_registry
from onehop.testing.contracts import check_registry

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
Start = Callable[..., subprocess.Popen[str]]


def cells(page: str) -> list[list[str]]:
    lines = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_page_of_the_command_line_is_current(start: Start) -> None:
    out, err = start(command=(sys.executable, str(DOCS / "cli_reference.py"))).communicate(timeout=30)
    assert out == (DOCS / "reference" / "cli.md").read_text(), (
        f"run: python docs/cli_reference.py > docs/reference/cli.md {err}"
    )


def test_each_setting_is_on_its_page_with_its_default() -> None:
    told = {row[0]: row[1] for row in cells("reference/settings.md") if len(row) == 3}
    for each in fields(Settings):
        default = each.default if not isinstance(each.default, str) else f'"{each.default}"'
        assert told.get(f"`{each.name}`") == f"`{default}`", each.name
    assert len(told) == len(fields(Settings)) + 2  # the head of the table and the line under it


def test_each_error_is_on_its_page_with_what_it_says_of_execution() -> None:
    page = (DOCS / "reference" / "errors.md").read_text()
    rows = {row[0].strip("`"): row for row in cells("reference/errors.md")}
    for name, each in vars(errors).items():
        if isinstance(each, type) and issubclass(each, errors.OnehopError):
            assert re.search(rf"^ *{name}$", page, re.MULTILINE), f"{name} is not in the tree"
            assert len(rows[name]) >= 3, name
            if issubclass(each, errors.CallError) and each is not errors.CallError:
                assert rows[name][2].startswith(f"`{each.executed}`"), name


def test_each_reason_of_a_rejection_is_on_the_page() -> None:
    page = (DOCS / "reference" / "errors.md").read_text()
    assert [reason for reason in REASONS if f"`{reason}`" not in page] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def blocks(page: str = "intro/tutorial.md") -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def served(process: subprocess.Popen[str], run: Callable[..., Any], eventually: Callable[..., None]) -> None:
    eventually(lambda: run("ping", "clock").code == 0 or process.poll() is not None, 20)
    assert process.poll() is None, process.communicate()


def test_three_lines_make_a_server_and_three_a_client(
    start: Start, run: Callable[..., Any], eventually: Callable[..., None]
) -> None:
    server, client = blocks()[:2]
    assert [sum(map(bool, each.splitlines())) for each in (server, client)] == [3, 3]
    process = start(command=(sys.executable, "-c", server))
    served(process, run, eventually)
    out, err = start(command=(sys.executable, "-c", client)).communicate(timeout=20)
    assert float(out) > 0, err
    assert float(run("call", "clock", "read").out) > 0


def test_the_tutorial_runs(
    start: Start, run: Callable[..., Any], eventually: Callable[..., None], tmp_path: Path
) -> None:
    service, calls, failing = blocks()[2:5]
    (tmp_path / "clock.py").write_text(service)
    process = start("serve", "clock:Clock", cwd=tmp_path)
    served(process, run, eventually)
    assert run("call", "clock", "read", "zone=cet").json["zone"] == "cet"
    assert run("call", "clock", "weekday", "2025-01-01T12:00:00Z").out == "Wednesday\n"
    assert run("call", "clock", "ticks", "2", "--stream").out == "0\n1\n"
    out, err = start(command=(sys.executable, "-c", calls + failing)).communicate(timeout=30)
    lines = out.splitlines()
    assert len(lines) == 8, out + err
    assert lines[0][:15] == lines[1][:15] == "{'zone': 'cet',"
    assert lines[2:5] == ["0", "1", "2"]
    assert "outcome='taken'" in lines[5]
    assert lines[7].startswith("CallTimeout unknown 'sleep' of service 'clock'")
    process.send_signal(signal.SIGKILL)


def test_the_page_about_writing_a_registry_holds_one_that_keeps_the_contract(run_directory: str) -> None:
    made, tested = blocks("howto/registry.md")
    names: dict[str, Any] = {}
    exec(made + tested, names)
    names["check_registry"] = partial(check_registry, within=5.0)  # half a second may pass on a busy machine
    names["test_it_keeps_the_contract"](Path(run_directory) / "place")


@pytest.mark.parametrize("name", ["zookeeper", "etcd", "redis"])
def test_each_option_of_a_registry_is_on_its_page(name: str) -> None:
    page = (DOCS / "registries" / f"{name}.md").read_text()
    with pytest.raises(SettingsError) as wrong:
        open_registry(f"{name}://server/?nonsense=1", Settings())
    options = str(wrong.value).partition("there are: ")[2].partition(";")[0].split(", ")
    assert len(options) > 3
    assert [each for each in options if f"`{each}`" not in page and f"`{each}=" not in page] == []


def test_the_list_of_hosts_on_the_page_is_one(tmp_path: Path) -> None:
    (listed,) = re.findall(r"```toml\n(.*?)```", (DOCS / "registries" / "hosts.md").read_text(), re.DOTALL)
    (tmp_path / "peers.toml").write_text(listed)
    assert open_registry(f"file://{tmp_path}/peers.toml", Settings()).addresses == (("ctl1", 9501), ("10.1.0.2", 9501))


def test_the_sizes_are_those_of_the_simulation(start: Start) -> None:
    out, err = start(command=(sys.executable, str(DOCS / "sizing.py"), "100")).communicate(timeout=120)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in out.splitlines()]
    told = {row[0]: row[1] for row in reversed(cells("topics/sizing.md")) if len(row) == 4}
    assert len(rows) > 15, err
    assert [(name, count) for name, count in rows[2:] if told.get(name) != count] == [], "run docs/sizing.py again"


def test_the_page_about_asyncio_runs(start: Start, run: Callable[..., Any], eventually: Callable[..., None]) -> None:
    server, client = blocks("howto/asyncio.md")
    process = start(command=(sys.executable, "-c", server))
    served(process, run, eventually)
    out, err = start(command=(sys.executable, "-c", client)).communicate(timeout=30)
    assert (out.splitlines(), err) == (["[0.0, 0.01, 0.02]", "2", "given up"], "")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 0
