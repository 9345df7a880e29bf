"""The conventions that a linter does not know: sizes, docstrings, citations, types, leftovers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sfumato"
FILE_CAP, FUNCTION_CAP, CLASS_CAP = 500, 80, 200  # lines; what to aim at: 60 to 250, 40 and 120

# Files that are a table rather than code may exceed FILE_CAP.
DATA_TABLES: frozenset[str] = frozenset()
# Public functions that may speak of Any: they take or give JSON, a tree of torch's states, or any config.
ANY_ALLOWED = frozenset(
    {
        "sfumato/checkpoints/foreign.py:read_json",
        "sfumato/core/config.py:to_json",
        "sfumato/families/schedulers.py:sampling_of",
        "sfumato/training/architecture.py:restore",
        "sfumato/training/log.py:RunLog.begin",
        "sfumato/training/posthoc.py:fit",
        "sfumato/training/state.py:Checkpoints.load",
        "sfumato/training/state.py:Checkpoints.save",
    }
)
TORCH_PROTOCOL = frozenset({"state_dict", "load_state_dict"})  # typed with Any by torch itself
# Folders of tests/ that hold data, not tests.
TEST_DATA = frozenset({"golden", "data", "__pycache__"})

# A paper, or for what never had one the code that it comes from.
CITATION = re.compile(
    r"k-diffusion|arXiv:\d{4}\.\d{4,5}|[A-Z][\w-]+( et al\.| & [A-Z][\w-]+)?,? \(?(19|20)\d\d"
)
LEFTOVER = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")
Function = ast.FunctionDef | ast.AsyncFunctionDef

SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for folder in (PACKAGE, ROOT / "benchmarks")
    for path in sorted(folder.rglob("*.py"))
}
TESTS = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in sorted((ROOT / "tests").rglob("*.py"))
}
every_source = pytest.mark.parametrize("name", list(SOURCES))


def lines(node: ast.stmt) -> int:
    """Length of a definition, from its `def` or `class` line to its end."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef, ast.AST]]:
    """(qualified name, definition, parent) of the functions, classes and methods that users may name.

    What is private, or inside a function, is left out.
    """
    for node in getattr(tree, "body", []):
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node, tree
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from definitions(node, f"{prefix}{node.name}.")


def is_stub(node: ast.AST) -> bool:
    """A body of `...` alone: a protocol's method or an overload, whose meaning is told elsewhere."""
    return isinstance(node, Function) and ast.unparse(node.body[-1]) == "..."


def decorators(node: ast.AST) -> list[str]:
    """Names of the decorators, called or not, last part only."""
    found = getattr(node, "decorator_list", [])
    calls = [d.func if isinstance(d, ast.Call) else d for d in found]
    return [ast.unparse(d).rsplit(".", 1)[-1] for d in calls]


def undocumented(tree: ast.Module) -> list[str]:
    """Public definitions without a docstring; the class speaks for `forward`, the getter for its setter."""
    return [
        name
        for name, node, parent in definitions(tree)
        if ast.get_docstring(node) is None
        and not is_stub(node)
        and not (isinstance(parent, ast.ClassDef) and node.name == "forward")
        and not {"setter", "override"} & set(decorators(node))
    ]


def annotations(node: Function) -> Iterator[ast.expr]:
    """Every annotation in the signature."""
    a = node.args
    for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg):
        if arg is not None and arg.annotation is not None:
            yield arg.annotation
    if node.returns is not None:
        yield node.returns


def speaks_of_any(tree: ast.Module) -> list[str]:
    """Public functions with Any somewhere in their signature."""
    found = []
    for name, node, _ in definitions(tree):
        if isinstance(node, Function) and node.name not in TORCH_PROTOCOL:
            words = {
                w for annotation in annotations(node) for w in re.findall(r"\w+", ast.unparse(annotation))
            }
            found += [name] if "Any" in words else []
    return found


def uncited(tree: ast.Module, registries: set[str]) -> list[str]:
    """Registered functions and classes whose docstring names no paper."""
    return [
        name
        for name, node, _ in definitions(tree)
        if registries & set(decorators(node)) and not CITATION.search(ast.get_docstring(node) or "")
    ]


@pytest.mark.parametrize("name", [*SOURCES, *TESTS])
def test_file_length(name: str) -> None:
    length = len((SOURCES | TESTS)[name].splitlines())
    assert length <= FILE_CAP or name in DATA_TABLES, f"{name} has {length} lines; split it"


@every_source
def test_definition_lengths(name: str) -> None:
    nodes = [n for n in ast.walk(ast.parse(SOURCES[name])) if isinstance(n, Function | ast.ClassDef)]
    caps = [(n, CLASS_CAP if isinstance(n, ast.ClassDef) else FUNCTION_CAP) for n in nodes]
    assert [f"{n.name}: {lines(n)} lines, cap {cap}" for n, cap in caps if lines(n) > cap] == []


@every_source
def test_public_definitions_are_documented(name: str) -> None:
    assert undocumented(ast.parse(SOURCES[name])) == []


@every_source
def test_no_any_in_public_signatures(name: str) -> None:
    assert [f for f in speaks_of_any(ast.parse(SOURCES[name])) if f"{name}:{f}" not in ANY_ALLOWED] == []


@every_source
def test_samplers_and_schedules_cite_their_paper(name: str) -> None:
    assert uncited(ast.parse(SOURCES[name]), {"sampler", "SAMPLERS", "schedule", "SCHEDULES"}) == []


def test_there_are_samplers_to_check() -> None:
    """The check above looks for decorators; it must not pass because they were renamed."""
    trees = [ast.parse(text) for text in SOURCES.values()]
    names = [
        n
        for tree in trees
        for n, node, _ in definitions(tree)
        if {"sampler", "SAMPLERS"} & set(decorators(node))
    ]
    assert len(names) >= 10


@every_source
def test_module_begins_with_docstring_and_future(name: str) -> None:
    tree = ast.parse(SOURCES[name])
    assert ast.get_docstring(tree), "say in one sentence what the module is for"
    if any(
        isinstance(n, Function | ast.ClassDef) for n in tree.body
    ):  # a list of re-exports has no annotations
        assert ast.unparse(tree.body[1]) == "from __future__ import annotations"


@pytest.mark.parametrize("name", [*SOURCES, *(n for n in TESTS if n != "tests/test_style.py")])
def test_no_leftovers(name: str) -> None:
    text = (SOURCES | TESTS)[name]
    assert [f"{i}: {line}" for i, line in enumerate(text.splitlines(), 1) if LEFTOVER.search(line)] == []


def test_exceptions_are_still_needed() -> None:
    """An entry of a list above that no longer excuses anything is removed with what it excused."""
    assert [t for t in DATA_TABLES if len(SOURCES.get(t, "").splitlines()) <= FILE_CAP] == []
    used = {f"{name}:{f}" for name, text in SOURCES.items() for f in speaks_of_any(ast.parse(text))}
    assert sorted(ANY_ALLOWED - used) == []


def test_tests_mirror_the_package() -> None:
    """Tests/a/b/test_c.py tests something below sfumato/a/b; no __init__.py, since pytest imports by path."""
    folders = {
        Path(name).parent.relative_to("tests") for name in TESTS if Path(name).name.startswith("test_")
    }
    strangers = [f.as_posix() for f in folders if f.parts[:1] not in {(d,) for d in TEST_DATA}]
    assert sorted(f for f in strangers if not (PACKAGE / f).is_dir()) == []
    assert [name for name in TESTS if name.endswith("__init__.py")] == []


# The checks check: each of them must see the fault it is there for.


def test_undocumented_sees_methods_but_not_stubs() -> None:
    code = (
        "class P(Protocol):\n    '''Doc.'''\n    def a(self): ...\n"
        "class N:\n    '''Doc.'''\n"
        "    def forward(self): return 1\n    def b(self): return 2\n    def _c(self): return 3\n"
        "def f(): return 4\n"
    )
    assert undocumented(ast.parse(code)) == ["N.b", "f"]


def test_any_is_seen_within_containers() -> None:
    code = (
        "def f(x: dict[str, Any]): ...\ndef g(x: int) -> list[Any]: ...\n"
        "def h(x: Anything): ...\ndef _i(x: Any): ..."
    )
    assert speaks_of_any(ast.parse(code)) == ["f", "g"]


@pytest.mark.parametrize(
    ("text", "cited"),
    [
        ("Song et al. 2021 (arXiv:2010.02502).", True),
        ("Algorithm 2 of Karras et al. (2022).", True),
        ("Ho & Salimans 2022.", True),
        ("A fast sampler, 20 steps.", False),
    ],
)
def test_citation(text: str, cited: bool) -> None:
    assert (uncited(ast.parse(f"@SAMPLERS('a')\ndef f():\n    '''{text}'''"), {"SAMPLERS"}) == []) == cited
