"""The compiled CPU kernels: any memory, any number of threads and any value give the same bits."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from block_cases import (
    ABLE,
    MAKERS,
    OPS,
    SOME,
    autocast,
    by_kernels,
    by_pytorch,
    chain,
    check_training,
    infer,
    make_op,
    make_rows,
    seeded,
)

from fastshift import cpu
from fastshift._native import cpu as _cpu
from fastshift.layers import OpModule
from fastshift.ops import inverted_residual, projection

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("isa", "poison")

# Whatever the memory


def _layouts(shape, dtype=torch.float32):
    """The same values in other memory."""
    n, c, h, w = shape
    rows = make_rows(shape).to(dtype)
    offset = torch.empty(rows.numel() + 1, dtype=dtype)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    wide = torch.full((n, c + 3, h, w), torch.nan, dtype=dtype)
    wide = wide.contiguous(memory_format=torch.channels_last)
    apart = torch.full((n, c, 2 * h, 3 * w), torch.nan, dtype=dtype)
    views = {
        "channels_first": rows.contiguous(),
        "unaligned": offset,
        "some_channels": wide[:, 2:-1],
        "every_third": apart[:, :, ::2, ::3],
        "transposed": torch.empty(n, c, w, h, dtype=dtype).transpose(2, 3),
    }
    for view in views.values():
        view.copy_(rows)
    assert views["unaligned"].data_ptr() % 8 == rows.element_size()
    return rows, views


@pytest.mark.parametrize("layout", _layouts((1, 1, 1, 1))[1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", SOME)
def test_any_memory_of_input_and_gradient_gives_the_same_bits(make, dtype, layout):
    module = make_op(make, 6)
    rows, views = _layouts((3, 6, 5, 4), dtype)
    dy, gradients = _layouts(module(rows.float()).shape, dtype)
    expected = by_kernels(module, rows, dy, dtype=dtype)
    for x, g in ((views[layout], dy), (rows, gradients[layout])):
        found = by_kernels(module, x, g, dtype=dtype)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    module.eval()
    with autocast(dtype):
        assert torch.equal(infer(module, views[layout]), infer(module, rows))


def test_a_gradient_that_is_one_number_for_all():
    module = make_op(chain, 6)
    x = make_rows((3, 6, 5, 4)).requires_grad_()
    y, _ = cpu.block_of(module, x).train(x)
    [expanded] = torch.autograd.grad(y.sum(), [x], retain_graph=True)
    [whole] = torch.autograd.grad(y, [x], torch.ones_like(y))
    assert torch.equal(expanded, whole)


@pytest.mark.parametrize("make", SOME)
def test_what_an_earlier_call_left_in_scratch_memory_never_shows(make):
    module, x = make_op(make, 6).eval(), make_rows((3, 6, 5, 4))  # PyTorch's passes leave it alone
    larger = torch.full((5, 6, 9, 8), torch.nan)
    dy = torch.randn(module(x).shape, generator=seeded(2))
    expected = by_kernels(module, x, dy), infer(module, x)
    for left in (larger, torch.full_like(x, torch.nan)):
        by_kernels(module, left, torch.full(module(left).shape, torch.nan))
        infer(module, left)
    found = by_kernels(module, x, dy), infer(module, x)
    assert torch.equal(found[1], expected[1])
    assert all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])


def test_outputs_are_memory_that_was_full_of_nan(poison):
    module, x = make_op(chain, 6), make_rows((3, 6, 5, 4))
    check_training(module, x)
    given = poison.given
    assert given > 0
    infer(module, x)
    assert poison.given > given


# Values that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("make", SOME)
def test_what_is_not_finite_spreads_as_in_pytorch(make, value):
    module, x = make_op(make, 6), make_rows((3, 6, 5, 4))
    x[1, 3, 2, 2] = value
    with torch.no_grad():
        y, _ = cpu.block_of(module, x).train(x)
        plain = copy.deepcopy(module)(x)
        assert torch.equal(y.isnan(), plain.isnan())
        assert y.isnan().any()
        module.eval()
        y, plain = infer(module, x), module(x)
        assert torch.equal(y.isfinite(), plain.isfinite())
        assert not y.isfinite().all()
        ordinary = plain.isfinite()
        assert torch.allclose(y[ordinary], plain[ordinary], rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_not_finite_reaches_every_parameter():
    module, x = make_op(chain, 6), make_rows((3, 6, 5, 4))
    y = module(x)
    dy = torch.ones_like(y)
    dy[0, :, 0, 0] = torch.nan
    found = by_kernels(module, x, dy)
    plain = by_pytorch(module, x, dy, torch.float32)
    for name in plain:
        if name[:2] == "d ":
            assert found[name].isnan().any() == plain[name].isnan().any(), name


# Threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKERS)
def test_the_number_of_threads_changes_no_bit(make, dtype, threads):
    module, x = make_op(make, 6), make_rows((19, 6, 5, 4))
    dy = torch.randn(module(x).shape, generator=seeded(2))
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        with autocast(dtype):
            inferred = infer(module, x)
        results.append({**by_kernels(module, x, dy, dtype=dtype), "infer": inferred})
    for found in results[1:]:
        assert all(torch.equal(found[name], results[0][name]) for name in found)


COUNTS = """
import os, torch
from fastshift import cpu
from fastshift.layers import OpModule
from fastshift.ops import projection

def running():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
module, x = OpModule(projection(6, 8, 1)), torch.randn(19, 6, 5, 4)
block = cpu.block_of(module, x)
counts = []
for threads in (1, 2, 1, 3):
    torch.set_num_threads(threads)
    before = running()  # torch may have started some of its own
    block.train(x)
    counts.append(running() - before)
print(*counts)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_as_many_threads_work_as_torch_is_told_to_use(isa):
    if isa != ABLE[0]:
        pytest.skip("counted once")
    found = subprocess.run([sys.executable, "-c", COUNTS], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["0", "1", "0", "1"]


def test_calls_from_several_threads_at_once_do_not_mix(threads):
    threads(2)
    modules = [make_op(chain, 6, seed=seed) for seed in range(4)]
    x = make_rows((9, 6, 5, 4))
    dy = torch.randn(modules[0](x).shape, generator=seeded(2))
    expected = [by_kernels(module, x, dy) for module in modules]
    with ThreadPoolExecutor(4) as pool:
        jobs = [(i, pool.submit(by_kernels, modules[i], x, dy)) for i in [*range(4)] * 8]
        for index, job in jobs:
            found = job.result(timeout=60)
            assert all(torch.equal(found[name], expected[index][name]) for name in found)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its ThreadSanitizer")
def test_no_two_threads_touch_memory_in_no_order(isa, tmp_path):
    if isa != ABLE[0]:
        pytest.skip("threads do not depend on the instruction set")
    sources = [ROOT / "tests" / "pool_stress.cpp", ROOT / "csrc" / "cpu" / "pool.cpp"]
    program = tmp_path / "pool_stress"
    command = ["g++", "-std=c++17", "-O1", "-fsanitize=thread", *sources, "-pthread", "-o", program]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in made.stderr and "tsan" in made.stderr:
        pytest.skip("no ThreadSanitizer")
    assert made.returncode == 0, made.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


FORK = """
import os, sys, torch
from fastshift import cpu
from fastshift.layers import OpModule
from fastshift.ops import inverted_residual

torch.set_num_threads(2)
op = OpModule(inverted_residual(6, 6, 1, 3, 3))
x = torch.randn(5, 6, 4, 4)

def trained():
    torch.set_num_threads(2)
    y, _ = cpu.block_of(op, x).train(x)
    return torch.cat([y.flatten(), *(g.flatten() for g in
                      torch.autograd.grad(y.square().sum(), list(op.parameters())))])

expected = trained()
child = os.fork()
if child == 0:
    with torch.no_grad():  # autograd's own threads do not live through a fork
        y, _ = cpu.block_of(op, x).train(x)
    os._exit(0 if torch.equal(y.flatten(), expected[: y.numel()]) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(trained(), expected)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own(isa):
    if isa != ABLE[0]:
        pytest.skip("threads do not depend on the instruction set")
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


# What is kept between calls


def test_memory_is_kept_up_to_the_most_in_use_and_handed_back_when_asked():
    cpu.release_memory()
    module, x = make_op(chain, 40), make_rows((8, 40, 20, 20))
    for _ in range(3):
        y, _ = cpu.block_of(module, x).train(x)
        use = _cpu.memory_use()
        assert use["in_use"] + use["kept"] <= use["peak"]
    before = use["in_use"]
    del y
    assert _cpu.memory_use()["in_use"] < before
    cpu.release_memory()
    assert _cpu.memory_use()["kept"] == 0


class _Calls:
    """A block's core called by itself, on random rows."""

    def __init__(self, op, dtype=torch.float32):
        self.block = cpu.CpuBlock(OpModule(op))
        self.core, self.images = self.block.core, (3, 7, 5)
        self.bf16 = dtype is torch.bfloat16
        shape = 3, *self.block.sizes(7, 5)[self.block.main - 1], op.out_channels
        self.x = torch.randn(3, 7, 5, op.in_channels, generator=seeded()).to(dtype)
        self.dy = torch.randn(shape, generator=seeded()).to(dtype)
        self.parameters = [p.detach() for p in self.block.parameters()]

    def given(self, isa=None):
        isa = isa or cpu.instruction_set()
        parameters = [p.data_ptr() for p in self.parameters]
        return isa, self.images, self.x.data_ptr(), parameters, self.block.eps

    def train(self, gradients, isa=None, packed=None, **options):
        saved = torch.zeros(self.core.saved_floats(self.images, self.bf16))
        statistics = torch.zeros(self.core.statistics_floats())
        y, dx = torch.zeros_like(self.dy), torch.zeros_like(self.x)
        kept = saved.data_ptr(), statistics.data_ptr()
        self.core.forward(*self.given(isa), *kept, y.data_ptr(), 1, self.bf16, packed)
        ends = self.dy.data_ptr(), dx.data_ptr(), [g.data_ptr() for g in gradients]
        self.core.backward(*self.given(isa), *kept, *ends, 1, self.bf16, packed, **options)
        return [y, statistics, dx, *gradients]

    def gradients(self):
        return [torch.full_like(p, torch.nan) for p in self.parameters]


def test_packed_weights_are_packed_anew_for_other_kernels_other_rows_and_other_weights():
    op = inverted_residual(16, 16, 1, 3, 3)
    calls = {dtype: _Calls(op, dtype) for dtype in (torch.float32, torch.bfloat16)}
    first = calls[torch.float32]
    for other in calls.values():
        other.block, other.core, other.parameters = first.block, first.core, first.parameters
    packed = _cpu.PackedWeights(first.core)
    moved = [p + 1 for p in first.parameters]
    for parameters in (first.parameters, moved):
        for isa in ABLE:
            for call in calls.values():
                call.parameters = parameters
                found = call.train(call.gradients(), isa, packed)
                assert all(map(torch.equal, found, call.train(call.gradients(), isa)))


def test_packed_weights_of_another_block_are_refused():
    call, other = (_Calls(projection(4, 4, 1)) for _ in range(2))
    with pytest.raises(ValueError, match="packed: of another block"):
        call.train(call.gradients(), packed=_cpu.PackedWeights(other.core))


@pytest.mark.parametrize("isa", ABLE)
@pytest.mark.parametrize("name", ["inverted_residual-e3-k3-s1", "conv_k3-s1", "chain"])
def test_gradients_that_are_there_are_added_to_when_asked(name, isa):
    """To the bit the sum of what is there and the gradient, rounded before."""
    call = _Calls(OPS[name](16))
    before = [torch.randn(p.shape, generator=seeded()) for p in call.parameters]
    once = call.train(call.gradients(), isa)
    twice = call.train([g.clone() for g in before], isa, add=True)
    others = len(once) - len(before)
    assert all(map(torch.equal, once[:others], twice[:others]))
    for g, there, total in zip(once[others:], before, twice[others:], strict=True):
        assert torch.equal(total, there + g)
