"""What is installed, under which names, and what importing it does not do."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import resources
from pathlib import Path

import pytest

import fastshift

ROOT = Path(__file__).parents[1]

PUBLIC = [
    "ChainSupernet",
    "CompiledSupernet",
    "Constraint",
    "Evaluator",
    "Evolution",
    "FastShiftError",
    "FeasibleSampler",
    "Frame",
    "Head",
    "Op",
    "PretrainOptions",
    "PretrainResult",
    "RetrainOptions",
    "Retrained",
    "Scored",
    "Scores",
    "Search",
    "SearchOptions",
    "SearchResult",
    "SearchSpace",
    "Supernet",
    "Unit",
    "data",
    "errors",
    "export",
    "load_supernet",
    "ops",
    "parse_constraints",
    "pretrain",
    "recalibrate",
    "retrain",
    "save_supernet",
    "search",
    "spaces",
    "transfer",
    "write_report",
]

IMPORT = """
import json, sys
before = set(sys.modules)
import fastshift, torch
print(json.dumps([sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
                  torch.cuda.is_initialized()]))
"""


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this Python by itself."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_the_public_names_are_these():
    assert fastshift.__all__ == PUBLIC


def test_every_public_name_is_there():
    for name in PUBLIC:
        assert getattr(fastshift, name) is not None


def test_importing_loads_no_extra_and_starts_no_gpu(fresh):
    loaded, cuda_started = json.loads(fresh(IMPORT))
    extras = {"PIL", "matplotlib", "nvidia", "onnx", "onnxruntime", "onnxscript", "rich", "sklearn"}
    assert not extras & set(loaded)
    assert not {"tensorboard", "torchvision", "triton"} & set(loaded)
    assert cuda_started is False


def test_kernels_import_under_the_package_name_alone(fresh):
    assert fresh("import fastshift.kernels as k; print(k.__name__)") == "fastshift.kernels\n"
    bare = python("-c", "import kernels", cwd=ROOT)
    assert bare.returncode != 0
    assert "this package is fastshift.kernels, imported as 'kernels'" in bare.stderr


def test_types_are_shipped():
    package = resources.files(fastshift)
    assert (package / "py.typed").is_file()
    assert (package / "_core.pyi").is_file()
    assert (package / "_cpu.pyi").is_file()


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
@pytest.mark.parametrize("part", ["_core", "_cpu"])
def test_the_compiled_parts_outlive_a_release_of_torch(part):
    file = importlib.import_module(f"fastshift.{part}").__file__
    done = subprocess.run(["readelf", "-d", file], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", done.stdout)
    assert any(name.startswith("libstdc++") for name in needed)
    assert not [name for name in needed if re.match(r"lib(torch|c10|aten)", name)]


# Compilers of other kinds, where they are installed; a wheel for such a machine is made of these.
OTHERS = [
    ("aarch64-linux-gnu-g++", ()),
    ("clang++", ()),
    ("clang++", ("--target=aarch64-linux-gnu",)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "options"), OTHERS, ids=lambda value: "".join(value))
def test_the_cpu_kernels_compile_elsewhere(compiler, options):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    sources = [
        path
        for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
        if path.stem == "kernels_generic" or not path.stem.startswith(("kernels_", "bindings"))
    ]
    assert {"block", "block_infer", "pool"} <= {path.stem for path in sources}
    command = [compiler, *options, "-std=c++17", "-Wall", "-Wextra", "-fsyntax-only", *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_version_stands_in_one_place():
    assert importlib.metadata.version("fastshift") == fastshift.__version__
    assert not re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_the_licence_is_the_one_that_is_named():
    assert importlib.metadata.metadata("fastshift")["License-Expression"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_takes_its_requirements_from_pyproject():
    # Without what a `make` around these tests was asked for.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}

    def commands(*goals):
        asked = ["make", "-n", "-B", *goals]
        done = subprocess.run(
            asked, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
        )
        assert "--no-build-isolation" in done.stdout
        return done.stdout

    found = commands("search", "lint")
    for requirement in ('"setuptools>=', '"pybind11>=', '"torch>=', '"ruff=='):
        assert requirement in found
    oldest = re.search(r'"torch>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert re.search(rf"pip install .*\btorch~={re.escape(oldest)}\.0 ", commands("test-oldest"))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_names_the_pythons_it_tried_where_none_is_new_enough(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run(
        ["make", "test", "PYTHON=/bin/false"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no Python of 3.10 or newer among: /bin/false" in done.stderr


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_a_build_and_an_import_need(tmp_path):
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "runs", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    done = python("setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=tree)
    assert done.returncode == 0, done.stderr
    [archive] = tmp_path.glob("fastshift-*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*/*.?pp")}
    assert sources | {"kernels/__init__.py", "LICENSE"} <= names
    wheel = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = python(*wheel, str(archive), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.glob("fastshift-*.whl")
    with zipfile.ZipFile(file) as packed:
        names = set(packed.namelist())
    assert {"fastshift/kernels/__init__.py", "fastshift/py.typed", "fastshift/_core.pyi"} <= names
    for part in ("_core", "_cpu"):
        assert any(re.fullmatch(rf"fastshift/{part}\..*\.(so|pyd)", name) for name in names)
    assert not any(name.startswith(("tests", "benchmarks", "kernels")) for name in names)
