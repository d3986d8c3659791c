"""Imports go one way (docs/architecture.md). Read from the source: nothing is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "kvcli"
COMMON = {"config", "errors", "grammar", "hub", "spans", ""}
"""What everyone may use. '' is the package itself, for its version."""

MAY_USE = {
    "cli": {
        "launch",
        "engine",
        "methods",
        "models",
        "evals",
        "results",
        "analysis",
        "testbed",
        "attention",
        "cache",
        "weights",
        "sandbox",
    },
    "sandbox": set(),
    "harness": {"engine", "evals", "models", "weights"},
    "launch": {"engine", "methods", "models", "evals", "results"},
    "engine": {"methods", "models", "evals", "results", "attention", "cache", "weights", "kvpress", "sandbox"},
    "methods": {"attention", "cache", "kvpress"},
    "kvpress": set(),
    "models": {"attention", "cache", "testbed"},
    "attention": {"cache"},
    "cache": set(),
    "evals": {"testbed", "sandbox"},
    "weights": {"testbed"},
    "results": set(),
    "analysis": {"results"},
    "testbed": {"models", "evals", "engine"},
}
PRINTERS = {"cli/output.py"}
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "transformers", "datasets"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(module: str) -> str:
    """'kvcli.models.loader' -> 'models'; 'kvcli' -> ''."""
    return module.removeprefix("kvcli").removeprefix(".").partition(".")[0]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            if node.module == "kvcli":
                yield from ((node.lineno, f"kvcli.{alias.name}" if (PACKAGE / f"{alias.name}.py").exists()
                             or (PACKAGE / alias.name).is_dir() else "kvcli") for alias in node.names)  # fmt: skip
            else:
                yield node.lineno, node.module or ""


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The module without `if TYPE_CHECKING:` blocks, which import nothing when it runs."""

    class Drop(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            test = node.test
            return None if isinstance(test, ast.Name) and test.id == "TYPE_CHECKING" else self.generic_visit(node)

    return ast.fix_missing_locations(Drop().visit(tree))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    here = path.relative_to(PACKAGE).parts
    part = here[0] if len(here) > 1 else ""
    for line, module in imports(without_type_checking(tree)):
        if not module.startswith("kvcli") or (part == "" and here[0] in ("__main__.py", "api.py")):
            continue
        target = part_of(module)
        if target != part and target not in COMMON:
            assert part, f"{name_of(path)}:{line} is used by everyone and imports kvcli.{target}"
            assert target in MAY_USE[part], f"{name_of(path)}:{line}: {part} may not import {target}"


ANALYSIS = ("marked", "statistics", "reading", "tables", "figures", "attention", "findings", "reports", "exports")
"""Packages of the analysis, in the order of docs/architecture.md: each may use those before it."""


def test_packages_of_the_analysis_use_those_before_them_only():
    for path in (PACKAGE / "analysis").rglob("*.py"):
        own = path.relative_to(PACKAGE / "analysis").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for line, module in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if module.startswith("kvcli.analysis."):
                used = module.split(".")[2]
                assert ANALYSIS.index(used) <= ANALYSIS.index(own), f"{path}:{line}: {own} may not import {used}"


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p).startswith(("analysis/", "results/"))], ids=name_of)
def test_reports_need_no_torch(path):
    found = {module.partition(".")[0] for _, module in imports(ast.parse(path.read_text(encoding="utf-8")))}
    assert not found & HEAVY


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_one_file_prints(path):
    if name_of(path) in PRINTERS:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            text = ast.unparse(node.func)
            assert text not in ("print", "typer.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write"), (
                f"{name_of(path)}:{node.lineno} prints; kvcli/cli/output.py does that"
            )


def test_heavy_libraries_are_not_imported_at_the_top_of_the_command_line():
    for path in FILES:
        if not name_of(path).startswith(("cli/", "results/")):
            continue
        tree = without_type_checking(ast.parse(path.read_text(encoding="utf-8")))
        top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        found = {module.partition(".")[0] for _, module in imports(top)}
        assert not found & (HEAVY | {"numpy", "yaml", "scipy", "matplotlib"}), name_of(path)


METHODS = {path.stem for path in (PACKAGE / "methods").glob("*.py") if not path.stem.startswith("_")} - {
    "base", "catalog", "composed", "context", "generating",
}  # fmt: skip
BASELINE = "full"
"""What every method is compared with: the one method that the engine and the analysis know by name."""
OTHER_MEANING = {
    "random": (
        "models/",
        "cli/list.py",
        "engine/bench.py",
        "engine/prepare.py",
        "engine/profiling.py",
        "engine/reweighting.py",
    ),
    "merge": ("methods/base.py", "methods/composed.py", "methods/catalog.py"),
}
"""Words that name a method and, there, something else: models with random weights, a kind of method."""


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_but_its_own_file_names_a_method(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    a_method = name_of(path).startswith("methods/") and path.stem in METHODS
    mine = {path.stem} if a_method else set()
    messages = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        # a method's own settings may name another one (a wrapper's base); a message may give an example
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not a_method and id(node) not in messages:
            found = node.value.partition(":")[0]
            elsewhere = name_of(path).startswith(OTHER_MEANING.get(found, ("-",)))
            if found in METHODS - mine - {BASELINE} and not elsewhere and " " not in node.value:
                raise AssertionError(f"{name_of(path)}:{node.lineno} names the method {found}")
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvcli.methods."):
            found = (node.module or "").rpartition(".")[2]
            assert found not in METHODS - mine, f"{name_of(path)}:{node.lineno} imports the method {found}"
