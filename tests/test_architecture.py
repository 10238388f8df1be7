"""Who may import whom, and how big things may be: read from the sources, compared with the table below."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent / "src"

LEAVES = "errors addresses settings interfaces statistics payload handlers"
PUBLIC = "onehop onehop.errors onehop.settings onehop.interfaces"

# part of onehop: (what of onehop it may import besides itself, which other packages besides the standard library)
MAY_IMPORT = {
    "onehop": ("errors settings interfaces sync asyncio handlers statistics", ""),  # __init__.py; the faces lazily
    "__main__": ("cli", ""),
    "errors": ("", ""),
    "settings": ("errors", "msgspec"),
    "interfaces": ("errors", "msgspec"),
    "addresses": ("errors settings", ""),
    "statistics": ("errors settings interfaces", "msgspec"),
    "payload": ("errors settings interfaces", "msgspec"),
    "handlers": ("errors settings interfaces statistics payload", "msgspec"),
    "protocol": ("errors", ""),
    "transport": ("protocol addresses errors settings interfaces statistics", "zmq"),
    "registry": ("errors addresses settings interfaces", "msgspec kazoo redis urllib3"),
    "serving": (f"{LEAVES} protocol transport", "msgspec"),
    "faces": (f"{LEAVES} protocol transport registry", "msgspec"),
    "sync": (f"{LEAVES} protocol transport registry faces serving", "msgspec"),
    "asyncio": (f"{LEAVES} protocol transport registry faces serving", "msgspec"),
    "oslo": (PUBLIC, "msgspec oslo_config oslo_messaging oslo_serialization oslo_utils"),
    "cli": (f"{PUBLIC} testing", "typer rich click oslo_config oslo_messaging oslo_serialization"),
    "testing": (
        f"onehop {LEAVES} protocol transport registry faces serving sync asyncio",
        "msgspec zmq pytest hypothesis",
    ),
}

# The core decides from its arguments alone: neither a clock nor a socket, nor what differs from run to run.
PROTOCOL_NEVER_IMPORTS = (
    "asyncio concurrent ctypes datetime logging msgspec multiprocessing os queue random secrets select selectors "
    "signal socket subprocess sys tempfile threading time uuid zmq"
)
PROTOCOL_NEVER_CALLS = "hash id input open print"
ORDERLESS_CALLS = "all any frozenset len max min set sorted sum"
NEVER_IMPORTED = "eventlet gevent pickle cPickle dill cloudpickle marshal shelve"
BANNED_IN_CLASS_NAMES = "Manager|Helper|Utils?|Impl|Wrapper|Base|Adaptor|Adapter"
LINES_OF_A_FILE = 700
# The aim was 2,500 for the blocking engine. What went beyond it are promises that turned out to need more: the outbox
# for absent receivers, the final goodbye of a drain, the forked child that touches nothing, the fan-out that passes
# silent peers by, and the ways in which a machine or a registry may refuse. Waiting in an asyncio loop came on top, and
# the housekeeping for a thousand links, the few workers of quick methods, the receiver that runs a lone request itself,
# and the express lane of the inbox. And what is beyond one host: endpoints of TCP, subsets, unused links that close,
# returning in turn, and fan-outs through relays. And what bad days ask for: whether a peer answers, fair shares among
# callers, the retry budget, requests that go on over another connection, and who comes when the machine has no room.
# And that a closed node leaves nothing open, not even until the next collection of garbage; that no stream ends as if
# it were whole where an item found no room; that a request which went on over a new connection is never said not to
# have run, nor one that was left unanswered; that whoever runs one hears when its caller is gone; that what is on its
# way to a queue when that closes is refused; that an interrupt, or want of memory, at a bad moment takes nothing from
# others; and that one silent receiver makes the others of a fan-out look no slower than they are.
CODE_LINES_OF_THE_CORE = 5_455
CORE = ("protocol", "transport", "oslo")


class Module(NamedTuple):
    name: str
    path: Path
    tree: ast.Module

    @property
    def part(self) -> str:
        return part_of(self.name)


def part_of(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def modules(root: Path = ROOT) -> dict[str, Module]:
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        found[name] = Module(name, path, ast.parse(path.read_text(), str(path)))
    return found


def imports(module: Module, known: dict[str, Module], *, at_import: bool = False) -> Iterator[str]:
    """Every module that `module` imports, by full name; only what runs when it is imported where `at_import`."""
    for node in statements(module.tree) if at_import else ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.path}:{node.lineno}: relative import"
            assert node.module is not None
            for each in node.names:
                inner = f"{node.module}.{each.name}"
                yield inner if inner in known else node.module


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from statements(node)


def against_the_table(known: dict[str, Module]) -> list[str]:
    wrong = []
    for module in known.values():
        inside, outside = MAY_IMPORT.get(module.part, ("", ""))
        allowed = {each if each.startswith("onehop") else f"onehop.{each}" for each in inside.split()}
        for name in imports(module, known):
            top = name.split(".")[0]
            if top in NEVER_IMPORTED.split():
                wrong.append(f"{module.name} imports {name}, which nothing may")
            elif top == "onehop":
                if part_of(name) != module.part and not {name, ".".join(name.split(".")[:2])} & allowed:
                    wrong.append(f"{module.name} imports {name}; of onehop it may import: {inside or 'nothing'}")
            elif module.part == "protocol" and top in PROTOCOL_NEVER_IMPORTS.split():
                wrong.append(f"{module.name} imports {name}; the core has no clock, socket, thread or randomness")
            elif top not in sys.stdlib_module_names and top not in outside.split():
                wrong.append(f"{module.name} imports {name}; of other packages it may import: {outside or 'none'}")
    return wrong


def cycles(known: dict[str, Module]) -> list[str]:
    graph = {name: set(imports(module, known, at_import=True)) & known.keys() for name, module in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def code_lines(source: str) -> int:
    """Lines that hold code: no comments, no blank lines, no docstrings."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def order_from_sets(tree: ast.Module) -> list[int]:
    """Lines that take elements out of a set in its own order, which differs between two runs of one seed."""

    def last_name(node: ast.AST) -> str:
        return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""

    def makes_set(node: ast.AST | None) -> bool:
        if isinstance(node, ast.BinOp):
            return makes_set(node.left) or makes_set(node.right)
        if isinstance(node, ast.Call):
            return last_name(node.func) in {"set", "frozenset"}
        return isinstance(node, ast.Set | ast.SetComp)

    sets = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and re.match(r"(set|frozenset)\b", ast.unparse(node.annotation)):
            sets.add(last_name(node.target))
        elif isinstance(node, ast.Assign) and makes_set(node.value):
            sets.update(map(last_name, node.targets))
    sets.discard("")

    orderless: set[ast.AST] = set()  # comprehensions whose result is the same in every order
    for node in ast.walk(tree):
        if isinstance(node, ast.SetComp):
            orderless.update(node.generators)
        elif isinstance(node, ast.Call) and last_name(node.func) in ORDERLESS_CALLS.split():
            orderless.update(each for argument in node.args for each in getattr(argument, "generators", ()))

    found = []
    for node in ast.walk(tree):
        taken: list[ast.expr] = []
        if node in orderless:
            continue
        if isinstance(node, ast.For | ast.comprehension):
            taken = [node.iter]
        elif isinstance(node, ast.Starred):
            taken = [node.value]
        elif isinstance(node, ast.Call) and last_name(node.func) in {
            "list",
            "tuple",
            "iter",
            "enumerate",
            "zip",
            "map",
        }:
            taken = [*node.args]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "pop":
            taken = [] if node.args else [node.func.value]
        found += [each.lineno for each in taken if makes_set(each) or last_name(each) in sets]
    return found


KNOWN = modules()


def test_every_module_has_a_row_in_the_table() -> None:
    assert {module.part for module in KNOWN.values()} - MAY_IMPORT.keys() == set()


def test_imports_follow_the_table() -> None:
    assert against_the_table(KNOWN) == []


def test_there_is_no_import_cycle() -> None:
    assert cycles(KNOWN) == []


def test_class_names_say_what_the_class_is() -> None:
    banned = re.compile(rf"({BANNED_IN_CLASS_NAMES})(?=[A-Z_0-9]|$)")
    for module in KNOWN.values():
        for node in ast.walk(module.tree):
            assert not (isinstance(node, ast.ClassDef) and banned.search(node.name)), f"{module.name}.{node.name}"


def test_no_file_is_too_long() -> None:
    lengths = {module.name: len(module.path.read_text().splitlines()) for module in KNOWN.values()}
    assert {name: lines for name, lines in lengths.items() if lines > LINES_OF_A_FILE} == {}


def test_the_core_stays_small(capsys: pytest.CaptureFixture[str]) -> None:
    count = dict.fromkeys(CORE, 0)
    for module in KNOWN.values():
        if module.part in count:
            count[module.part] += code_lines(module.path.read_text())
    with capsys.disabled():
        print(f"\ncode lines: {count}, together {sum(count.values())} of {CODE_LINES_OF_THE_CORE}")
    assert sum(count.values()) <= CODE_LINES_OF_THE_CORE, count


def test_the_core_reads_nothing_but_its_arguments() -> None:
    for module in KNOWN.values():
        if module.part != "protocol":
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                where = f"{module.path}:{node.lineno} calls {node.func.id}()"
                assert node.func.id not in PROTOCOL_NEVER_CALLS.split(), where
        assert order_from_sets(module.tree) == [], f"{module.path} takes elements out of a set in its own order"


def tree_of(root: Path, sources: dict[str, str]) -> dict[str, Module]:
    for name, source in sources.items():
        path = root / "onehop" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return modules(root)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", "import msgspec"),
        ("protocol/calls", "import time"),
        ("protocol/calls", "from onehop.settings import Settings"),
        ("protocol/calls", "def f():\n    import zmq"),
        ("registry/local", "from onehop import protocol"),
        ("sync/node", "import zmq"),
        ("sync/node", "from onehop.asyncio import node"),
        ("faces", "from onehop.sync import node"),
        ("serving", "from onehop import registry"),
        ("oslo/driver", "from onehop.sync.node import Node"),
        ("oslo/driver", "from onehop import transport"),
        ("transport/loop", "from onehop.testing import contracts"),
        ("transport/loop", "import pickle"),
        ("cli/demo", "import eventlet.green"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, module: str, source: str) -> None:
    known = tree_of(tmp_path, {module: source, "protocol/__init__": "", "transport/__init__": ""})
    assert len(against_the_table(known)) == 1


def test_a_right_import_is_let_through(tmp_path: Path) -> None:
    assert (
        against_the_table(
            tree_of(tmp_path, {"oslo/driver": "import os\nfrom onehop import Node, errors", "errors": ""})
        )
        == []
    )


def test_an_import_cycle_is_found(tmp_path: Path) -> None:
    here, there = "from onehop.sync import there", "import onehop.sync.here"
    assert cycles(tree_of(tmp_path / "bad", {"sync/here": here, "sync/there": there}))
    for later in (f"def f():\n    {there}", f"if TYPE_CHECKING:\n    {there}"):
        assert cycles(tree_of(tmp_path / "good", {"sync/here": here, "sync/there": later})) == []


def test_code_lines_are_counted_without_words_about_them() -> None:
    assert (
        code_lines('"""Doc."""\n\n# why\nx = """a\nb"""\n\ndef f():\n    """Doc\n    string."""\n    return 1\n') == 4
    )


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("for x in {1, 2}: pass", [1]),
        ("self.seen = set()\nfor x in self.seen: pass", [2]),
        ("seen: set[int] = f()\ny = list(seen)", [2]),
        ("seen = frozenset(a)\ny = [x for x in seen]", [2]),
        ("seen = set()\nseen.pop()", [2]),
        ("seen = set()\nfor x in sorted(seen): pass\n3 in seen", []),
        ("seen = {}\nfor x in seen: pass", []),
        ("seen = {each for each in {1, 2}}\nany(each for each in seen)", []),
    ],
)
def test_order_taken_from_a_set_is_found(source: str, lines: list[int]) -> None:
    assert order_from_sets(ast.parse(source)) == lines
