"""A process in use that forks again and again, and the ledger of what its children did and what it lost.

::

    python tests/system/forks.py --forks 1000 --threads 32

The process serves, and its threads call another server, and itself, all the time. It forks by ``os.fork`` and by
``multiprocessing``. Each child uses what it inherited, or a node of its own, or serves, or does nothing; each must
have an identity of its own or a clean error. At the end the parent must have lost no call and no descriptor, and no
child may be left over.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # its directory is in the path then, and not the repository
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.system.progress import Progress, end_with, interrupted

import onehop

SERVER = """
import sys
import onehop

node = onehop.Node()
node.serve("other", {"echo": lambda value: value}, server="other")
print("serving", flush=True)
sys.stdin.read()
"""
KINDS = ("uses the node", "uses a node of its own", "serves", "closes the node", "does nothing")


def as_child(kind: str, number: int, node: onehop.Node, client: onehop.Client, parent: str) -> str:
    """What a child does; returns the id that it had."""
    if kind == "uses the node":
        assert client.call("echo", number) == number
        assert node.call("parent", "echo", number) == number
        assert node.id != parent
        return node.id
    if kind == "uses a node of its own":
        with onehop.Node(timeout=20.0) as own:
            assert own.call("parent", "echo", number) == number
            return own.id
    if kind == "serves":
        node.serve(f"child-{number}", {"who": os.getpid})
        with onehop.Node(timeout=20.0) as own:
            assert own.call(f"child-{number}", "who") == os.getpid()
        id = node.id
        node.close()
        return id
    if kind == "closes the node":
        node.close()
        try:
            client.call("echo", 1)
        except onehop.NodeClosed:
            return ""
        raise AssertionError("a closed node called")
    return ""


def in_process(number: int, kind: str, node: Any, client: Any, parent: str, write: int) -> None:
    os.write(write, as_child(kind, number, node, client, parent).encode())


class Storm:
    """One run.

    Args:
        forks: how many.
        threads: that call meanwhile.
    """

    def __init__(self, forks: int, threads: int) -> None:
        self.forks, self.threads = forks, threads
        self.failed: list[str] = []
        self.codes: Counter[str] = Counter()
        self.calls = 0
        self.slowest = 0.0
        self.ids: list[str] = []
        self._stop = threading.Event()

    def run(self) -> bool:
        """Run it and print the ledger; whether all adds up."""
        server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"serving\n"
            with onehop.Node(timeout=20.0) as node:
                node.serve("parent", {"echo": lambda value: value}, server="parent")
                return self._measure(node)
        finally:
            server.kill()
            server.wait()
            for end in (server.stdin, server.stdout):
                assert end is not None
                end.close()

    def _measure(self, node: onehop.Node) -> bool:
        client = node.client("other")
        threads = [threading.Thread(target=self._call, args=(node, number)) for number in range(self.threads)]
        for each in threads:
            each.start()
        parent, began = node.id, time.monotonic()
        self._fork(0, node, client, parent)  # what is opened once is open from now on
        before = len(os.listdir("/proc/self/fd"))
        with Progress(self.forks, "forks", lambda: len(self.ids)):
            for number in range(1, self.forks):
                self._fork(number, node, client, parent)
                if interrupted.is_set():
                    raise KeyboardInterrupt
        seconds = time.monotonic() - began
        after = len(os.listdir("/proc/self/fd"))
        self._stop.set()
        for each in threads:
            each.join(30)
        left = self._left_over()
        outside = onehop.Node(timeout=20.0)
        known = [each.node for each in outside.nodes()]
        outside.close()
        ids = [each for each in self.ids if each]
        print(
            f"{self.forks} forks in {seconds:.1f} s beside {self.threads} threads, which made {self.calls} calls, "
            f"{len(self.failed)} failed, the slowest {self.slowest:.3f} s; descriptors {before} before, {after} after"
        )
        for code, count in sorted(self.codes.items()):
            print(f"  {code}: {count}")
        checks = {
            "the parent lost no call": self.failed == [] and not any(each.is_alive() for each in threads),
            "each child ended well": all(code.endswith("ended with 0") for code in self.codes),
            "each child had an identity of its own": len({parent, *ids}) == 1 + len(ids) and node.id == parent,
            "the parent has as many descriptors": after <= before + 4,
            "nobody is left over": not left,
            "no record is left of a child": not set(ids) & set(known) and parent in known,
        }
        for check, holds in checks.items():
            print(f"  {'ok  ' if holds else 'FAIL'} {check}")
        for each in self.failed[:10]:
            print(f"  wrong: {each}")
        return all(checks.values())

    def _call(self, node: onehop.Node, thread: int) -> None:
        service = "other" if thread % 4 else "parent"
        client, number = node.client(service, timeout=30.0), 0
        while not self._stop.is_set():
            number += 1
            began = time.monotonic()
            try:
                if client.call("echo", [thread, number]) != [thread, number]:
                    self.failed.append(f"{thread}, {number}: another's reply")
            except BaseException as error:
                self.failed.append(repr(error))
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.calls += 1  # not exact under threads, and need not be
            self._stop.wait(0.005)

    def _fork(self, number: int, node: onehop.Node, client: onehop.Client, parent: str) -> None:
        kind = KINDS[number % len(KINDS)]
        read, write = os.pipe()
        if number % 2:
            process = multiprocessing.get_context("fork").Process(
                target=in_process, args=(number, kind, node, client, parent, write)
            )
            process.start()
            process.join(60)
            code = process.exitcode
            if code is None:
                process.kill()
            process.close() if code is not None else None
        else:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    in_process(number, kind, node, client, parent, write)
                    code = 0
                except BaseException as error:
                    os.write(2, f"child {number} ({kind}): {error!r}\n".encode())
                finally:
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(write)
        self.ids.append(os.read(read, 100).decode())
        os.close(read)
        self.codes[f"{'multiprocessing' if number % 2 else 'os.fork'}, {kind}: ended with {code}"] += 1

    def _left_over(self) -> bool:
        """Whether a child lives, or is a zombie; the server is one that we started otherwise."""
        with open(f"/proc/self/task/{os.getpid()}/children") as children:
            return len(children.read().split()) > 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--forks", type=int, default=150)
    parser.add_argument("--threads", type=int, default=32)
    options = parser.parse_args()

    def run() -> bool:
        directory = tempfile.mkdtemp(prefix="oh-", dir="/tmp")
        os.environ["ONEHOP_RUN_DIRECTORY"] = directory
        try:
            return Storm(options.forks, options.threads).run()
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    end_with(run)


if __name__ == "__main__":
    main()
