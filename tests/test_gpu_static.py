"""The static checks of the kernels: what is noted of a launch, read and counted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

import triton
import triton.language as tl
from catalogue import DTYPES, Case, Inputs, Network, cases, record, recorded
from interpreter_memory import watch
from kernel_sites import SITES, SMALL, network
from machine_code import compile_launch, occupancy, read_code
from static_counts import FORMS, counted_bytes

from fastshift.ops import chain_params
from fastshift.spaces import build
from fastshift.static_levels import levels_of
from fastshift.supernet import Supernet

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "records" / "gpu_static.json"
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


@triton.jit
def _copy_kernel(x_ptr, y_ptr, count, reach, step, nothing, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * step, mask=offs < reach, other=0.0)
    tl.store(y_ptr + offs, x, mask=offs < count)


def _copy(x, count=None, reach=None, step=1):
    y = x.new_empty(x.shape)
    count = len(x) if count is None else count
    reach = count if reach is None else reach
    _copy_kernel[(triton.cdiv(len(x), 8),)](x, y, count, reach, step, None, BLOCK=8, num_warps=1)
    return y


# What a launch is compiled for


class _Pair(NamedTuple):
    x: Any
    size: Any


def test_a_launch_is_compiled_for_types_constants_and_alignments():
    x = torch.zeros(64, dtype=torch.bfloat16)
    given = (x[8:], x[1:], 48, 1, 2**40, None)
    with record() as found:
        _copy_kernel[(3,)](*given, BLOCK=8, num_warps=2, num_stages=1)
        _copy_kernel[(1, 2)](_Pair(x[1:], 16), x, 7, 0.5, True, None, BLOCK=8)
    first, second = found.launches
    names = ("x_ptr", "y_ptr", "count", "reach", "step", "nothing", "BLOCK")
    types = ("*bf16", "*bf16", "i32", "constexpr", "i64", "constexpr", "constexpr")
    assert first.signature == dict(zip(names, types, strict=True))
    assert first.constexprs == {(3,): 1, (5,): None, (6,): 8}
    assert set(first.attrs) == {(0,), (2,), (4,)}
    assert first.attrs[0,] == [["tt.divisibility", 16]]
    assert (first.grid, first.options) == ((3, 1, 1), {"num_warps": 2, "num_stages": 1})
    assert second.signature["x_ptr"] == _Pair("*bf16", "i32")
    assert set(second.attrs) == {(0, 1), (1,)}
    assert second.grid == (1, 2, 1)


def test_a_recording_counts_pytorchs_kernels_and_the_memory_made():
    with record() as found:
        x = torch.empty(10, 10, device="meta")
        view = x.t()[:5]
        total = view.sum(dim=0)
        total.add_(1)
        torch.zeros(4, device="meta")
        _copy(total)
    assert [launch.name for launch in found.launches] == ["_copy_kernel"]
    assert found.torch_launches == ["aten::sum", "aten::add_", "aten::zeros"]
    assert found.allocated_bytes == 4 * (100 + 10 + 4 + 10)


def test_launches_share_machine_code_where_types_constants_and_alignments_do():
    def key(*args, **kwargs):
        with record() as found:
            _copy(*args, **kwargs)
        return found.launches[0].key

    x = torch.empty(64, device="meta")
    assert key(x) == key(torch.empty(128, device="meta"))
    for other in ((x[:63],), (x[1:],), (x.half(),), (x, 64, 64, 2)):
        assert key(x) != key(*other)


# Sites


def test_every_level_of_a_space_has_its_shape_among_the_sites():
    for site in (*SITES, SMALL):
        space = build(site.space, image_size=site.image_size, num_classes=site.num_classes)
        place = network(site)
        with torch.device("meta"):
            supernet = Supernet(space)
        size = (site.image_size, site.image_size, space.in_channels)
        own_levels = levels_of(supernet, size, site.num_nodes)
        assert {level.layer for level in place.levels} == {own.layer for own in own_levels}
        assert [place.levels[i].name for i in (0, 1, -1)] == ["stem", "block 1", "head"]
        values = sum(torch.Size(shape).numel() for shape, _ in place.parameters)
        ops = [op for block in space.blocks for op in block]
        own = sum(op.params(space.affine) for op in (*ops, space.head))
        own += chain_params(space.stem, space.affine)
        assert values == own
        pairs = [pair for _, pair in place.parameters]
        assert min(pairs) == -1
        assert max(pairs) < space.num_choices.sum()
        for level in place.levels:
            assert {parent < level.rows[0] for parent in level.parent} == {True}
    assert [site.name for site in SITES] == [
        "shufflenet_v2 224",
        "shufflenet_v2 64",
        "nasbench_macro 32",
        "digits 8",
    ]


def test_every_listed_case_prepares_what_its_launcher_takes():
    place = network(SMALL)
    for dtype in DTYPES:
        found = list(cases(place, dtype))
        assert len({(case.name, case.site) for case in found}) == len(found)
        for case in found:
            assert isinstance(case, Case)
            recording = recorded(case)
            assert recording.launches, case.name
            assert len(recording.launches) + len(recording.torch_launches) <= case.launches


# The machine code

USAGE = (
    "Resource usage:\n Common:\n  GLOBAL:0\n Function k:\n  REG:75 STACK:{} SHARED:1024 LOCAL:0\n"
)
LISTING = """
.text.k:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0020*/               @P1 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/             @UP0  UTCHMMA gdesc[UR4], tmem[UR5] ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R2, RZ ;
        /*0050*/                   STG.E.64 desc[UR4][R2.64], R4 ;
"""


def test_machine_code_is_read_for_registers_spills_widths_and_tensor_cores():
    found = read_code(USAGE.format(0), LISTING)
    assert found == {
        "registers": 75,
        "stack_bytes": 0,
        "spills": 0,
        "load_bytes": 16,
        "store_bytes": 8,
        "loads": {"2": 1, "16": 1},
        "tensor": {"HMMA": 1, "UTCHMMA": 1},
    }
    spilled = LISTING + "        /*0060*/                   STL.64 [R1], R4 ;\n"
    assert read_code(USAGE.format(8), spilled)["spills"] == 1
    assert read_code(USAGE.format(8), spilled)["stack_bytes"] == 8
    plain = "        /*0000*/                   FFMA R1, R2, R3, R4 ;\n"
    found = read_code(USAGE.format(0), plain)
    assert (found["load_bytes"], found["store_bytes"], found["tensor"]) == (0, 0, {})
    for texts in (("", LISTING), (USAGE.format(0), "")):
        with pytest.raises(ValueError, match=r"^usage, listing: "):
            read_code(*texts)


def test_occupancy_is_the_least_that_a_resource_admits():
    assert occupancy(80, 32, 0, 4) == 1.0
    assert occupancy(80, 255, 0, 4) == 8 / 64  # 65536 / (256 x 32) warps
    assert occupancy(80, 33, 0, 4) == 48 / 64  # 40 registers: 51 warps, so 12 programs of four
    assert occupancy(80, 32, 80 * 1024, 4) == 8 / 64  # two programs beside their reserve
    assert occupancy(90, 32, 80 * 1024, 4) == 8 / 64
    assert occupancy(90, 32, 74 * 1024, 4) == 12 / 64
    assert occupancy(80, 16, 0, 1) == 32 / 64  # as many programs as there can be


@interpreted
def test_kernels_of_the_interpreter_are_not_compiled():
    with record() as found:
        _copy(torch.empty(8, device="meta"))
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_launch(found.launches[0], 90)


# Accesses under the interpreter


@interpreted
def test_bytes_are_counted_and_what_stays_inside_passes():
    x = torch.randn(21)
    with watch() as found:
        y = _copy(x)
    assert torch.equal(x, y)
    assert (found.loaded_bytes, found.stored_bytes, found.programs) == (84, 84, 3)
    assert found.violations == []


@interpreted
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"reach": 24}, "load of 3 lanes outside"),
        ({"count": 24, "reach": 21}, "store of 3 lanes outside"),
        ({"step": 2}, "load of 5 lanes outside"),
        ({"step": -1}, "load of 7 lanes outside"),
    ],
)
def test_a_wrong_kernel_is_caught_and_its_access_does_not_happen(wrong, words):
    x = torch.randn(21)
    with watch() as found:
        _copy(x, **wrong)
    assert found.violations
    assert "_copy_kernel, program (" in found.violations[0]
    assert words in found.violations[0]


@interpreted
def test_an_access_that_runs_into_another_tensor_is_caught():
    whole = torch.zeros(64)
    x = whole[:16].clone()
    distance = (whole.data_ptr() - x.data_ptr()) // 4
    with watch() as found:
        _copy_kernel[(1,)](x, torch.empty(8), 2, 2, distance, whole, BLOCK=8)
    (line,) = found.violations
    assert "load of 2 lanes across several tensors" in line


@interpreted
@pytest.mark.parametrize(("step", "lanes"), [(1, 0), (-1, 7), (3, 2)])
def test_a_view_is_checked_by_its_own_extent_and_not_by_its_storages(step, lanes):
    part = torch.zeros(64)[16:32]
    with watch() as found:
        _copy_kernel[(1,)](part, torch.empty(8), 8, 8, step, None, BLOCK=8)
    assert len(found.violations) == (lanes > 0)
    assert all(f"load of {lanes} lanes outside" in line for line in found.violations)


@interpreted
def test_a_kernel_may_reach_the_tensors_in_its_table_of_addresses_alone():
    @triton.jit
    def follow_kernel(table_ptr, y_ptr, step):
        x_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
        tl.store(y_ptr, tl.load(x_ptr + step))

    x, y = torch.tensor([3.0]), torch.zeros(1)
    table = torch.tensor([x.data_ptr()])
    with watch() as found:
        follow_kernel[(1,)](table, y, 0)
    assert found.violations == []
    assert y.item() == 3
    with watch() as found:
        follow_kernel[(1,)](table, y, 1)
    assert len(found.violations) == 1
    assert y.item() == 0


def test_bytes_of_inference_are_counted_in_each_form():
    kernels = {"in bands": "infer_bands_kernel", "by stages": "infer_step_kernel"}
    for dtype in SMALL.targets:
        for case in cases(network(SMALL, whole=False), dtype):
            for form, card in FORMS.items() if case.by_card else ():
                launches = recorded(case, card).launches
                assert {launch.name for launch in launches} == {kernels[form]}
    found = json.loads(RECORD.read_text())["counted"]
    assert {name.split(" | ")[2] for name in found} == {"bf16", "fp32"}
    for form in FORMS:
        assert f"layer_infer {form} | digits 8 block 3 | fp32" in found


@interpreted
def test_no_listed_kernel_leaves_its_tensors_at_the_small_shapes():
    counts = counted_bytes(Network("tiny", 2, 4, 3, 5, 2, (((3, 5), -1), ((7,), 0))), DTYPES)
    assert counts
    for name, count in counts.items():
        assert count["loaded_bytes"] > 0, name
        assert count["stored_bytes"] >= count["written_bytes"], name


# numpy warns of lanes whose results no one takes, such as a quotient behind a branch not taken.
@interpreted
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_listed_kernel_leaves_its_tensors_in_the_small_network():
    assert counted_bytes(network(SMALL, whole=False), SMALL.targets)


@pytest.mark.slow
def test_the_program_compiles_reads_and_counts_without_a_gpu(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_static.py")]
    only = ["--only", r"^(candidate_loss|sgd_step) \| digits 8 \| bf16", "--json"]
    done = subprocess.run(
        [*command, *only, str(tmp_path / "found.json")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["cases"]) == 2
    assert all(set(codes) == {"80", "90", "100"} for codes in found["kernels"].values())
    assert set(found["counted"]) == set(found["cases"])


_COMPILE = """
import torch, triton
from catalogue import cases, recorded
from kernel_sites import SITES, network
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
[case] = [c for c in cases(network(SITES[-1], whole=False), "bf16") if c.name == "layer_infer"]
[launch] = recorded(case).launches
source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)
print(launch.name, found.asm["ttgir"], "=====", found.asm["ptx"])
"""


@pytest.mark.slow
def test_a_barrier_over_all_memory_stands_behind_each_job_of_a_band(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    paths = [str(ROOT), str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-c", _COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, text = done.stdout.split(maxsplit=1)
    assert name == "infer_bands_kernel"
    code, assembly = text.split("=====")
    lines = [re.sub(r" loc\(.*", "", line) for line in code.splitlines()]
    (barrier,) = (i for i, line in enumerate(lines) if line.strip() == "ttg.barrier all")
    stores = [i for i, line in enumerate(lines) if "tt.store" in line]
    assert max(stores) < barrier
    # The next lines end a pass of the loop over jobs, which begins before the first store.
    assert lines[barrier + 1].strip().startswith("scf.yield")
    assert lines[barrier + 2].strip().startswith("}")
    indent = " " * (len(lines[barrier]) - len(lines[barrier].lstrip()) - 2)
    begin = re.compile(indent + r"%\w+ = scf\.while ")
    assert any(begin.match(line) for line in lines[: min(stores)])
    assert "bar.sync" in assembly
    assert "ld.global.nc" not in assembly  # loads that may miss what the program has written


def test_inputs_are_seeded_and_have_no_values_on_meta():
    first, second = (Inputs("cpu").normal(3, 4) for _ in range(2))
    assert torch.equal(first, second)
    assert Inputs("meta").normal(3, 4, dtype=torch.bfloat16).device.type == "meta"
    assert Inputs("cpu").integers(2, 5, 100).unique().tolist() == [2, 3, 4]
