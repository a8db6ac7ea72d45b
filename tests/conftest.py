"""What must be set before torch and Triton are imported: threads, device, the kernels' interpreter.

One thread an operator: results repeat, busy cores do not spin. What asks for no device gets a CPU
wherever the suite runs: tests of a GPU are marked and name theirs. Without a CUDA device Triton's
kernels run in its interpreter, which is chosen when a kernel is defined.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["FASTSHIFT_DEVICE"] = "cpu"

import numpy as np
import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from block_cases import ABLE, Poisoned

from fastshift import cpu


@pytest.fixture(autouse=True)
def _quick_interpreter(monkeypatch):
    """Have Triton's interpreter lose less time, wherever it is used.

    Of itself (Triton 3.8) it patches the language anew for each call of a function inside of a
    kernel; it makes a table of all types to look up one; and it computes each sum and product of
    int32 twice, to look for one that overflows, which `make sanitize-kernels` still does.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or os.environ.get("TRITON_INTERPRET") != "1":
        return
    from interpreter_scalars import take_scalars

    take_scalars()
    call, core = interpreter.InterpretedFunction.__call__, interpreter.tl.core

    def call_inside(function, *arguments, **options):
        # A function of the language itself patches `tl.core` at the first call, for good.
        if function.fn.__module__.startswith("fastshift.") or not core.is_builtin(core.load):
            return function.rewrite()(*arguments, **options)
        return call(function, *arguments, **options)

    def numpy_type(dtype):
        if type(dtype) is not core.dtype:
            return look_up(dtype)
        if dtype.name not in known:
            known[dtype.name] = look_up(dtype)
        return known[dtype.name]

    look_up, known = interpreter._get_np_dtype, {}
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call_inside)
    monkeypatch.setattr(interpreter, "_get_np_dtype", numpy_type)
    if os.environ.get("FASTSHIFT_WATCH") != "1":
        builder = interpreter.interpreter_builder
        unchecked = dataclasses.replace(builder.options, sanitize_overflow=False)
        monkeypatch.setattr(builder, "options", unchecked)


@pytest.fixture
def like_a_device(monkeypatch):
    """Have Triton's interpreter round as devices do: it (3.8) cuts float32 off to bfloat16."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter.InterpreterBuilder.cast_impl

    def cast(builder, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return convert(builder, source, target)
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(bits.numpy(), target.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)


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


# Gives each program a child of its own, in which torch is loaded and nothing else of ours.
_FRESH = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    code, said = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(said + ".out", os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(os.open(said + ".err", os.O_WRONLY | os.O_CREAT), 2)
            exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """Run a program where nothing was imported but torch, which takes most of a start.

    Called with a program's text, it gives what it said, or fails with what it complained of.
    """
    place = tmp_path_factory.mktemp("fresh")
    parent = subprocess.Popen(
        [sys.executable, "-c", _FRESH],
        cwd=place,  # in the root, Python would take its folders for the installed ones
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    numbers = itertools.count()

    def run(code):
        said = str(place / str(next(numbers)))
        print(json.dumps([code, said]), file=parent.stdin, flush=True)
        status = int(parent.stdout.readline())
        complaint = Path(said + ".err").read_text()
        assert status == 0, complaint
        return Path(said + ".out").read_text()

    yield run
    parent.stdin.close()
    parent.wait(timeout=60)
    parent.stdout.close()


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
