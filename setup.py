"""Build the compiled parts; everything else is declared in pyproject.toml."""

from __future__ import annotations

import os
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("FASTSHIFT_BUILD_JOBS", default=2).install()

# Last on the compiler's line, after the flags here: `make sanitize` lowers -O and adds its own.
MORE = os.environ.get("FASTSHIFT_CXXFLAGS", "").split()
# Products and sums contracted to fused multiply-adds: the kernels count on it.
CPU_FLAGS = ["-O2", "-ffp-contract=fast"]

setup(
    ext_modules=[
        Pybind11Extension(
            "fastshift._core",
            ["csrc/population/bindings.cpp"],
            depends=sorted(glob("csrc/population/*.hpp")),
            cxx_std=17,
            extra_compile_args=["-O3", *MORE],
            extra_link_args=MORE,
        ),
        Pybind11Extension(
            "fastshift._cpu",
            sorted(glob("csrc/cpu/*.cpp")),
            depends=sorted(glob("csrc/cpu/*.hpp")),
            cxx_std=17,
            extra_compile_args=[*CPU_FLAGS, *MORE],
            extra_link_args=MORE,
        ),
    ],
    cmdclass={"build_ext": build_ext},
)
