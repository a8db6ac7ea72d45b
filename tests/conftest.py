"""What must be set before torch and Triton are imported: threads, device, the kernels' interpreter.

One thread an operator: results repeat, busy cores do not spin. What asks for no device gets a CPU
wherever the suite runs: tests of a GPU are marked and name theirs. Without a CUDA device Triton's
kernels run in its interpreter, which is chosen when a kernel is defined.
"""

from __future__ import annotations

import dataclasses
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["FASTSHIFT_DEVICE"] = "cpu"

import numpy as np
import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from block_cases import ABLE, Poisoned

from fastshift import cpu


@pytest.fixture
def like_a_device(monkeypatch):
    """Have Triton's interpreter round as devices do, and lose less time.

    Of itself (Triton 3.8) it cuts float32 off to bfloat16; it patches the language anew for each
    call of a function inside of a kernel; and it computes each sum and product of int32 twice, to
    look for one that overflows, which `make sanitize-kernels` still does.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    convert, call = builder.cast_impl.__func__, interpreter.InterpretedFunction.__call__

    def cast(builder, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return convert(builder, source, target)
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(bits.numpy(), target.scalar)

    def call_inside(function, *arguments, **options):
        # A function of the language itself patches `tl.core` at the first call, for good.
        is_patched = not tl.core.is_builtin(tl.core.load)
        if is_patched or function.fn.__module__.startswith("fastshift."):
            return function.rewrite()(*arguments, **options)
        return call(function, *arguments, **options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call_inside)
    if os.environ.get("FASTSHIFT_WATCH") != "1":
        unchecked = dataclasses.replace(builder.options, sanitize_overflow=False)
        monkeypatch.setattr(builder, "options", unchecked)


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch):
    """Durability and TensorBoard have tests of their own; elsewhere they would only take time."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # an extra


@pytest.fixture
def last_program_first(monkeypatch):
    """Have the interpreter run a launch's programs from the last to the first, once called."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx

    def place_reversed(*index):
        place(*(size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)))

    return lambda: monkeypatch.setattr(builder, "set_grid_idx", place_reversed)


@pytest.fixture(autouse=True)
def _kernels_stay_inside_their_tensors(request):
    """Check every access of the kernels' own tests where `make sanitize-kernels` asks for it."""
    is_asked = os.environ.get("FASTSHIFT_WATCH") == "1"
    if not is_asked or not request.path.name.startswith("test_kernels"):
        yield
        return
    from interpreter_memory import watch

    with watch() as found:
        yield
    assert not found.violations, found.violations[:3]


@pytest.fixture
def new_memory_is_nan(monkeypatch):
    """What `Tensor.new_empty` gives is full of NaN, or of one number: what is not written shows."""
    plain = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


# Of the tests of the operators and of the compiled CPU kernels


@pytest.fixture
def backend(monkeypatch):
    """Choose the operators' implementation by its name; the machine's own without."""
    monkeypatch.delenv("FASTSHIFT_BACKEND", raising=False)
    return lambda name: monkeypatch.setenv("FASTSHIFT_BACKEND", name)


@pytest.fixture(params=ABLE)
def isa(request, monkeypatch):
    """Each instruction set that the machine has, one after the other."""
    monkeypatch.setenv("FASTSHIFT_CPU_ISA", request.param)
    monkeypatch.delenv("FASTSHIFT_BACKEND", raising=False)
    return request.param


@pytest.fixture
def poison(monkeypatch):
    """Memory that `fastshift.cpu` asks for is full of NaN: what is not written shows."""
    poisoned = Poisoned()
    monkeypatch.setattr(cpu, "torch", poisoned)
    memory = cpu._memory
    monkeypatch.setattr(cpu, "_memory", lambda floats: poisoned.count(memory(floats)))
    return poisoned


@pytest.fixture
def threads():
    """Set the number of torch's threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
