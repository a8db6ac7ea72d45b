"""What a kernel's machine code says of it: registers, spills, accesses, tensor cores, occupancy.

Triton compiles for any card without one, and ships `cuobjdump` and `nvdisasm`, which read the
result. Nothing here runs a kernel, so nothing here is a time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from catalogue import Launch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastshift.kernels.cards import CARDS

__all__ = ["MachineCode", "compile_launch", "occupancy", "read_code"]


# Of the three architectures alike.
_REGISTERS = 65536
_WARPS = 64
_PROGRAMS = 32
_REGISTER_UNIT = 256  # a warp's registers are given out in such steps
_SHARED_RESERVED = 1024  # of every program

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_TENSOR = re.compile(r"^(?:[HIQDO]MMA|[HIQD]GMMA|UTC\w*MMA)$")
_LOADS = ("LDG", "LDGSTS", "LD")
_STORES = ("STG", "ST")
_BULK = {"UTMALDG": "load", "UBLKCP": "load", "UTMASTG": "store"}
_BULK_BYTES = 16
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class MachineCode:
    """One kernel, compiled for one architecture.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread's local memory, and `spills`: instructions that go there.
        shared_bytes: of a program.
        warps: of a program.
        occupancy: share of a multiprocessor's warps that registers, shared memory and the number
            of programs admit; at most, since nothing says that they are there.
        load_bytes, store_bytes: of the widest global access of a thread.
        loads: counts of global loads by a thread's bytes.
        tensor: counts of tensor-core instructions by name.
        products: whether the kernel has a matrix product.
    """

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    warps: int
    occupancy: float
    load_bytes: int
    store_bytes: int
    loads: dict[str, int]
    tensor: dict[str, int]
    products: bool

    def row(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def occupancy(capability: int, registers: int, shared_bytes: int, warps: int) -> float:
    """Return the largest share of a multiprocessor's warps that can be there at once.

    Args:
        capability: 80, 90 or 100.
        registers: of a thread.
        shared_bytes: of a program.
        warps: of a program.
    """
    warp_registers = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // warp_registers // warps
    by_shared = CARDS[capability].shared // (shared_bytes + _SHARED_RESERVED)
    programs = min(_PROGRAMS, _WARPS // warps, by_registers, by_shared)
    return programs * warps / _WARPS


def read_code(usage: str, listing: str) -> dict[str, Any]:
    """Read what the two tools print.

    Args:
        usage: of `cuobjdump -res-usage`.
        listing: of `nvdisasm -c`.

    Returns:
        `registers`, `stack_bytes`, `spills`, `load_bytes`, `store_bytes`, `loads` and `tensor`.

    Raises:
        ValueError: a text is not as the tools print it.
    """
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    names = _INSTRUCTION.findall(listing)
    if found is None or not names:
        raise ValueError("usage, listing: no registers or no instructions in them")
    loads, stores = [0], [0]
    spills, tensor = 0, Counter()
    for name in names:
        kind, *suffixes = name.split(".")
        width = next((_WIDTHS[s] for s in suffixes if s in _WIDTHS), 4)
        if kind in _LOADS:
            loads.append(width)
        elif kind in _STORES:
            stores.append(width)
        elif kind in _BULK:
            (loads if _BULK[kind] == "load" else stores).append(_BULK_BYTES)
        elif kind in ("LDL", "STL"):
            spills += 1
        elif _TENSOR.match(kind):
            tensor[kind] += 1
    return {
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "spills": spills,
        "load_bytes": max(loads),
        "store_bytes": max(stores),
        "loads": {str(width): count for width, count in sorted(Counter(loads[1:]).items())},
        "tensor": dict(sorted(tensor.items())),
    }


def _printed_by(tool: str, *arguments: str) -> str:
    """Return what one of Triton's own copies of NVIDIA's tools prints.

    Raises:
        RuntimeError: it fails.
    """
    command = [getattr(knobs.nvidia, tool).path, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def compile_launch(launch: Launch, capability: int) -> MachineCode:
    """Compile a launch for an architecture, without a card, and read its machine code.

    Args:
        launch: as `catalogue.record` found it.
        capability: 80, 90 or 100.

    Raises:
        RuntimeError: the process runs Triton's interpreter, whose kernels cannot be compiled.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("compile_launch: under Triton's interpreter; unset TRITON_INTERPRET")
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage = _printed_by("cuobjdump", "-res-usage", str(file))
        listing = _printed_by("nvdisasm", "-c", str(file))
    found = read_code(usage, listing)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    return MachineCode(
        **found,
        shared_bytes=shared,
        warps=warps,
        occupancy=occupancy(capability, found["registers"], shared, warps),
        products="tt.dot" in compiled.asm["ttir"],
    )
