"""The tree: who may import whom, and what only loads where it is needed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports only from those before it. A folder counts as one module.
ORDER = (
    "errors",
    "kernels",
    "device",
    "prefetch",
    "_native",
    "archs",
    "costs",
    "constraints",
    "ops",
    "space",
    "spaces",
    "backends",
    "data",
    "layers",
    "tracing",
    "made_of",
    "cpu",
    "folding",
    "channel_moments",
    "row_layout",
    "population_layer",
    "level_moments",
    "_operators_ref",
    "_operators_cpu",
    "_operators_triton",
    "operators",
    "supernet",
    "pareto",
    "sampler",
    "population",
    "_population_ref",
    "trie",
    "levels",
    "batch_norm",
    "optim",
    "graphs",
    "steps",
    "static_operators",
    "static_levels",
    "compiled",
    "node_tables",
    "row_buffers",
    "static_state",
    "population_pass",
    "static_update",
    "training_pass",
    "static_supernet",
    "evaluator",
    "progress",
    "durable",
    "versions",
    "checkpoint",
    "weights",
    "single_path",
    "identity",
    "trainer",
    "pretrain",
    "shift",
    "result",
    "search_options",
    "search_files",
    "search_record",
    "search_training",
    "search_loop",
    "search",
    "tables",
    "ranking",
    "retrain",
    "latency",
    "export",
    "_report_run",
    "_report_figures",
    "_report_page",
    "report",
    "methods",
    "settings",
    "options",
    "config",
    "build",
    "run_directory",
    "commands",
    "queries",
    "cli",
    "__main__",
    "testing",
)
NOT_ORDERED = {"__init__", "_core", "_cpu"}  # the public names, and the compiled parts

# Loaded only inside what needs them: extras, and what would start a device or a compiler.
LAZY = {
    "PIL",
    "matplotlib",
    "nvidia",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "torchvision",
    "triton",
}


def sources() -> list[Path]:
    """Every Python file of the package."""
    return sorted([*ROOT.glob("fastshift/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def module_of(path: Path) -> str:
    """A file's entry in the order."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def imported(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """Line and entry of every import from the package, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            first, _, rest = (node.module or "").partition(".")
            if first == "fastshift":
                names = [rest] if rest else [alias.name for alias in node.names]
                yield from ((node.lineno, name.partition(".")[0]) for name in names)
            elif first == "kernels":
                yield node.lineno, "kernels under its bare name"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == "fastshift":
                    yield node.lineno, rest.partition(".")[0] or "__init__"
                elif first == "kernels":
                    yield node.lineno, "kernels under its bare name"


def at_module_level(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and top-level package of the imports that run when the module is loaded."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "").partition(".")[0]
        pending.extend(ast.iter_child_nodes(node))


def test_every_module_has_its_place_in_the_order():
    missing = {module_of(path) for path in sources()} - set(ORDER) - NOT_ORDERED
    assert not missing, f"no place in ORDER for {sorted(missing)}"
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_those_before_it(path):
    me = module_of(path)
    if path == ROOT / "fastshift/__init__.py":
        return
    allowed = {*ORDER[: ORDER.index(me)], me}
    if me in ("_native", "_population_ref", "testing"):
        allowed |= {"_core", "_cpu"}
    if me in ("cli", "build", "queries", "testing"):
        allowed.add("__version__")
    wrong = [
        f"line {n}: {name}"
        for n, name in imported(ast.parse(path.read_text()), path)
        if name not in allowed
    ]
    assert not wrong, f"{me} may not import {wrong}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_optional_packages_are_imported_where_they_are_used(path):
    lazy = LAZY - {"triton"} if module_of(path) == "kernels" else LAZY
    found = [
        f"line {n}: {name}"
        for n, name in at_module_level(ast.parse(path.read_text()))
        if name in lazy
    ]
    assert not found, f"loaded with the module: {found}"


def test_the_import_loads_no_statistics_compiler_or_exporter_that_torch_does_not(fresh):
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastshift, fastshift.cli\n"
        "heavy = ('scipy', 'torch.export', 'torch.onnx', 'torch._dynamo', 'torch._inductor')\n"
        "new = {m for m in set(sys.modules) - before if (m + '.').startswith(tuple(\n"
        "    name + '.' for name in heavy))}\n"
        "assert not new, sorted(new)\n"
        "assert 'scipy.stats' not in sys.modules\n"
    )
    fresh(code)


def test_kernels_know_nothing_of_fastshift():
    for path in ROOT.glob("kernels/**/*.py"):
        names = {name for _, name in imported(ast.parse(path.read_text()), path)}
        assert names <= {"kernels"}, path


def test_every_file_postpones_the_evaluation_of_annotations():
    for path in [*sources(), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]:
        assert "from __future__ import annotations" in path.read_text(), path


def test_every_module_says_what_it_is():
    for path in sources():
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_nothing_sits_where_it_would_shadow_an_installed_package():
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests/__init__.py").exists()
