"""A population layer in training by Triton: forward and backward are the reference's."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from catalogue import record

from fastshift import backends, spaces
from fastshift.errors import ConfigError
from fastshift.kernels import _launch, addresses, infer, layer_shares, plan
from fastshift.kernels import layer as kernels
from fastshift.operators import implementation, layer_backward, layer_train
from fastshift.ops import (
    Frame,
    Op,
    Unit,
    conv,
    identity,
    inverted_residual,
    projection,
    shuffle_unit,
    shuffle_xception,
)
from fastshift.population_layer import (
    LayerOp,
    LayerUnit,
    describe_layer,
    describe_op,
    parse_layer,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # "cpu" is Triton's interpreter
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="needs Triton's interpreter")
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Of an error relative to float64: fine if twice the reference's in the same type, or below these;
# for a gradient, which symmetry can make zero, a tenth of these in shares of the largest one too.
FLOORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def _op(units, frame, stride=1, shortcut=()):
    """An op of (kind, in, out, kernel, stride, activation), its channels from its units'."""
    units, shortcut = (tuple(Unit(*u) for u in chain) for chain in (units, shortcut))
    c_in, c_out = units[0].in_channels, units[-1].out_channels
    return Op("op", c_in, c_out, stride, units, Frame(frame, shortcut))


def _rare(c):
    """Chains of other orders, dense ones with a stride, and shortcuts of each kind."""
    wide = ("pointwise", c, 2 * c, 1, 1, None)
    return [
        _op([("depthwise", c, c, 3, 2), wide, ("depthwise", 2 * c, 2 * c, 3)], "plain", 2),
        _op(
            [("depthwise", c, c, 3, 2), wide],
            "residual",
            2,
            [("dense", c, 2 * c, 3, 2)],
        ),
        _op([("dense", c, 2 * c, 3, 2)], "residual", 2, [("pointwise", c, 2 * c, 1, 2, None)]),
        inverted_residual(c, 2 * c, 2, 1, 3),
    ]


OPS = {
    "s1": lambda c: [
        identity(c),
        inverted_residual(c, c, 1, 2, 3),
        shuffle_unit(c, c, 1, 3),
        conv(c, c, 3, 1),
        shuffle_xception(c, c, 1),
    ],
    "s2": lambda c: [
        projection(c, 2 * c, 2),
        inverted_residual(c, 2 * c, 2, 2, 3),
        shuffle_unit(c, 2 * c, 2, 3),
        shuffle_xception(c, 2 * c, 2),
    ],
    "rare": _rare,
    "kernels": lambda c: [
        _op([("depthwise", c, c, k, s)], "plain", s) for k, s in ((3, 2), (5, 2), (7, 2))
    ],
    "pair": lambda c: [inverted_residual(c, c, 1, 2, 3), shuffle_unit(c, c, 1, 3)],
    "one": lambda c: [identity(c), _op([("pointwise", c, c)], "residual")],
}
SHAPES = {"easy": (4, 8, 6, 6), "odd": (3, 6, 5, 3), "tiny": (5, 4, 1, 1)}  # N, C, H, W
# Rows above, parent and choice of each node; the last has padding and a row that no one reads.
POPULATIONS = {
    "every_choice": (2, [1, 1, 0, 0, 1], [4, 3, 2, 1, 0]),
    "one_choice": (2, [0, 1, 1], [2, 2, 2]),
    "padded": (3, [2, 0, 9, 2, -1], [1, 0, -1, 2, -1]),
}


def _layer(ops, affine=True):
    """A described layer, no two units of which have one epsilon."""
    eps = iter(range(1, 100))

    def unit_of(unit):
        sizes = (unit.in_channels, unit.out_channels, unit.kernel, unit.stride)
        relu = unit.activation == "relu"
        return LayerUnit(unit.kind == "depthwise", *sizes, relu, next(eps) * 1e-3, affine, affine)

    def op_of(op):
        if op.is_identity:
            return None
        units = tuple(unit_of(unit) for unit in (*op.units, *op.frame.shortcut))
        return LayerOp(units, len(op.units), op.frame.kind)

    return describe_layer(describe_op(op_of(op)) for op in ops)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _buffer(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class _Case:
    """A layer, rows, nodes and parameters."""

    def __init__(
        self, name, shape, population="every_choice", dtype=torch.float32, affine=True, at=0.0
    ):
        n, c, h, w = shape
        self.text = _layer(OPS[name](c), affine)
        self.layer = parse_layer(self.text)
        named = isinstance(population, str)
        num_rows, parent, choice = POPULATIONS[population] if named else population
        num_choices = len(self.layer.ops)
        self.parent = _buffer(parent)
        self.choice = _buffer([i % num_choices if i >= 0 else i for i in choice])
        rows = torch.randn(num_rows, n, h, w, c, generator=_generator(1)) + at
        self.rows = rows.to(DEVICE, dtype)
        self.parameters, generator = [], _generator()
        for size in self.layer.shapes:
            scale = math.sqrt(2 / math.prod(size[1:])) if len(size) > 1 else 1.0
            self.parameters.append((torch.randn(size, generator=generator) * scale).to(DEVICE))

    def trained(self, dtype=None, nodes=slice(None)):
        """Rows of nodes that are there, statistics and gradients by name.

        Args:
            dtype: of rows and parameters; the case's rows and float32 parameters without.
            nodes: which.
        """
        rows = (self.rows if dtype is None else self.rows.to(dtype)).clone().requires_grad_()
        given = [p.to(dtype or p.dtype).clone().requires_grad_() for p in self.parameters]
        parent, choice = self.parent[nodes], self.choice[nodes]
        y, statistics, _ = layer_train(rows, parent, choice, given, self.text)
        dy = torch.randn(len(self.choice), *y.shape[1:], generator=_generator(2))
        dy = dy.to(self.rows.dtype)[nodes].to(y.device, y.dtype)
        dy[choice < 0] = math.nan  # of padding nothing is read
        gradients = torch.autograd.grad(y, [rows, *given], dy, allow_unused=True)
        found = {"y": y.detach()[choice >= 0], "statistics": statistics, "d rows": gradients[0]}
        for index, (p, g) in enumerate(zip(given, gradients[1:], strict=True)):
            found[f"d parameter {index}"] = torch.zeros_like(p) if g is None else g
        return found


@pytest.fixture(autouse=True)
def use(monkeypatch):
    """Choose the implementation by its name; at first the Triton kernels."""
    monkeypatch.setenv("FASTSHIFT_BACKEND", "triton")
    return lambda name: monkeypatch.setenv("FASTSHIFT_BACKEND", name)


class _Poisoned:
    """`torch`, but its `empty` gives NaN, or an address that no one may read."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*size, **options):
        made = torch.empty(*size, **options)
        return made.fill_(math.nan if made.is_floating_point() else 1)


@pytest.fixture(autouse=True)
def _unwritten_is_nan(monkeypatch):
    monkeypatch.setattr(kernels, "torch", _Poisoned())


pytestmark = pytest.mark.usefixtures("like_a_device")


def _errors(case, use, found=None):
    """Of results by name: ours, the reference's in the rows' type, and the value's norm."""
    found = case.trained() if found is None else found
    use("reference")
    exact, plain = case.trained(torch.float64), case.trained(case.rows.dtype)
    use("triton")
    errors = {}
    for name, right in exact.items():
        assert found[name].shape == right.shape, name
        ours, theirs = (float((a[name].double() - right).norm()) for a in (found, plain))
        if not math.isfinite(theirs):  # PyTorch's own, in bfloat16 of a map smaller than the kernel
            theirs = 0.0
        errors[name] = ours, theirs, float(right.norm())
    return errors


def _assert_accurate(case, use, found=None):
    """Within twice the error of the reference that computes in the rows' own type.

    In a narrow type a value near zero may fall on either side of a ReLU, in the reference as in the
    kernels, and a gradient jumps by it: these are compared on average, and each over draws below.
    """
    errors, floor = _errors(case, use, found), FLOORS[case.rows.dtype]
    largest = max(norm for name, (_, _, norm) in errors.items() if name[:2] == "d ")
    ratios = []
    for name, (ours, theirs, norm) in errors.items():
        limit = max(2 * theirs, floor * norm)
        if name[:2] == "d ":
            least = 0.1 * floor * largest
            limit = max(limit, least)
            ratios.append(max(ours, least) / max(theirs, least))
            if case.rows.dtype is not torch.float32:
                limit = math.inf
        assert ours <= limit, f"{name}: error {ours:.3g}, limit {limit:.3g}"
    assert case.rows.dtype is torch.float32 or _geometric_mean(ratios) <= 1.25


def _geometric_mean(values):
    return float(np.exp(np.log(values).mean()))


# The kernels are the reference


@pytest.mark.parametrize(
    ("name", "shape", "population", "dtype"),
    [
        ("s1", "odd", "every_choice", torch.float32),
        ("s2", "odd", "padded", torch.float32),
        ("rare", "tiny", (1, [0, 0, 0], [0, 1, 2]), torch.float32),
        ("s1", "tiny", "padded", torch.bfloat16),
        ("s2", "tiny", (1, [0, 0], [2, 3]), torch.float16),
        ("kernels", "tiny", (1, [0, 0, 0], [0, 1, 2]), torch.float32),
    ],
    ids=lambda value: NAMES.get(value) if isinstance(value, torch.dtype) else None,
)
def test_training_and_every_gradient_are_as_accurate_as_the_references(
    name, shape, population, dtype, use
):
    case = _Case(name, SHAPES[shape], population, dtype)
    assert implementation(case.layer, case.rows, case.parameters) == "triton"
    _assert_accurate(case, use)


GRID = [
    ("s1", "easy", torch.float32),
    ("s1", "odd", torch.bfloat16),
    ("s2", "easy", torch.bfloat16),
    ("s2", "tiny", torch.float32),
    ("rare", "odd", torch.float32),
    ("rare", "tiny", torch.bfloat16),
    ("kernels", "easy", torch.float32),
    ("kernels", "odd", torch.float16),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "dtype"), GRID, ids=lambda v: NAMES.get(v, v))
def test_any_layer_is_as_accurate_as_the_references(name, shape, dtype, use):
    population = {"easy": "one_choice", "odd": "every_choice", "tiny": "padded"}[shape]
    _assert_accurate(_Case(name, SHAPES[shape], population, dtype), use)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAMES.get)
def test_each_gradient_of_a_narrow_type_is_as_accurate_over_draws(dtype, use):
    ratios = {}
    for seed in range(7):
        case = _Case("pair", (4, 6, 4, 3), (1, [0, 0], [0, 1]), dtype)
        rows = torch.randn(case.rows.shape, generator=_generator(10 + seed))
        case.rows = rows.to(case.rows)
        errors = _errors(case, use)
        largest = max(norm for _, _, norm in errors.values())
        least = 0.1 * FLOORS[dtype] * largest
        for name, (ours, theirs, _) in errors.items():
            ratios.setdefault(name, []).append(max(ours, least) / max(theirs, least))
    for name, found in ratios.items():
        assert _geometric_mean(found) <= 2, name


def test_batch_norms_without_scale_and_shift(use):
    _assert_accurate(_Case("pair", (2, 4, 2, 2), (1, [0], [1]), affine=False), use)


def test_partial_results_of_many_tiles(use, monkeypatch):
    """Moments, totals and weights of more tiles than one program has, in uneven shares."""
    monkeypatch.setattr(layer_shares, "MOST_PARTS", 3)
    case = _Case("one", (5, 20, 8, 8), (1, [0], [1]))
    launches = []
    monkeypatch.setattr(_launch.Launch, "__call__", _noting(launches))
    found = case.trained()
    step = next(launch for launch in launches if "splits" in launch.arguments)
    assert step.arguments["chunk"] == 2
    assert step.arguments["parts"] == 3
    assert step.arguments["splits"] > 3
    _assert_accurate(case, use, found)


def _small_tiles(monkeypatch):
    """Tiles of 16 in every direction, and few programs for the pixels."""
    chosen = layer_shares.blocks_of

    def smallest(*sizes):
        found, kept = dataclasses.asdict(chosen(*sizes)), ("warps", "stages")
        return _launch.Blocks(**{k: n if k in kept else min(n, 16) for k, n in found.items()})

    monkeypatch.setattr(layer_shares, "blocks_of", smallest)
    monkeypatch.setattr(layer_shares, "FRAME_CHANNELS", 16)
    monkeypatch.setattr(layer_shares, "MOST_PARTS", 3)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("pair", (2, 20, 3, 3), torch.float32),
        pytest.param("pair", (2, 24, 3, 3), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("s1", (2, 20, 4, 3), torch.float32, marks=pytest.mark.slow),
        pytest.param("s2", (2, 20, 5, 4), torch.float32, marks=pytest.mark.slow),
        pytest.param("rare", (2, 20, 4, 3), torch.float16, marks=pytest.mark.slow),
    ],
    ids=lambda value: NAMES.get(value) if isinstance(value, torch.dtype) else None,
)
def test_several_tiles_of_channels_in_every_direction(name, shape, dtype, use, monkeypatch):
    _small_tiles(monkeypatch)
    case = _Case(name, shape, (2, [0, 1], [0, 1]) if name == "pair" else "every_choice", dtype)
    launches = []
    monkeypatch.setattr(_launch.Launch, "__call__", _noting(launches))
    found = case.trained()
    for field in ("tiles", "row_tiles", "o_tiles", "i_tiles", "splits"):
        most = max(launch.arguments.get(field, 0) for launch in launches)
        assert most > 1, field
    _assert_accurate(case, use, found)


@interpreted
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("pair", "s2")]
)
def test_no_bit_depends_on_the_order_of_programs(name, monkeypatch, last_program_first):
    _small_tiles(monkeypatch)
    case = _Case(name, (2, 20, 3, 3), (2, [0, 1, 0], [1, 0, 1]))
    found = case.trained()
    last_program_first()
    again = case.trained()
    for name, value in found.items():
        assert torch.equal(value, again[name]), name


def test_moments_far_from_zero(use):
    """A mean of a hundred deviations."""
    case = _Case("one", (4, 8, 5, 5), (1, [0], [1]), at=100.0)
    use("reference")
    exact = case.trained(torch.float64)["statistics"].view(1, 5, -1)
    assert float((exact[:, 0].abs() / exact[:, 1].sqrt()).median()) > 30
    use("triton")
    _assert_accurate(case, use)


# What nodes share, and what they do not


def test_results_repeat_to_the_bit_and_do_not_depend_on_the_company():
    case = _Case("pair", (2, 4, 3, 2), (2, [0, 1], [1, 0]))
    found, again = case.trained(), case.trained()
    assert all(torch.equal(found[name], again[name]) for name in found)
    alone = case.trained(nodes=slice(1, 2))
    assert torch.equal(alone["y"][0], found["y"][1])
    assert torch.equal(alone["statistics"][0], found["statistics"][1])
    assert torch.equal(alone["d rows"][1], found["d rows"][1])


def test_padding_contributes_nothing(use):
    """Its statistics are zeros, its gradient is not read, and neither is a parent of its."""
    case = _Case("one", (2, 4, 2, 2), (2, [7, 0, -3], [-1, 1, -5]))
    found = case.trained()
    assert not found["statistics"][[0, 2]].any()
    assert not found["d rows"][1].any()
    assert all(value.isfinite().all() for value in found.values())
    assert torch.equal(found["y"], case.trained(nodes=slice(1, 2))["y"])
    nothing = _Case("one", (2, 4, 2, 2), (1, [0, 0], [-1, -1])).trained()
    assert not any(value.any() for value in nothing.values())


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_padding_has_zeros_for_rows_on_a_cpu(name, use):
    use(name)
    case = _Case("s1", SHAPES["odd"], "padded")
    rows, nodes = case.rows.cpu(), (case.parent.cpu(), case.choice.cpu())
    given = [p.cpu() for p in case.parameters]
    y, statistics, _ = layer_train(rows, *nodes, given, case.text)
    there = nodes[1] >= 0
    assert not y[~there].any()
    assert not statistics[~there].any()
    kept = layer_train(rows, nodes[0][there], nodes[1][there], given, case.text)
    assert torch.equal(y[there], kept[0])


def test_an_identity_is_a_copy(use):
    case = _Case("one", (2, 4, 2, 2), (2, [1, 0, 1], [0, 0, 0]), torch.bfloat16)
    found = case.trained()
    assert torch.equal(found["y"], case.rows[case.parent.long()])
    use("reference")
    assert torch.equal(found["d rows"], case.trained()["d rows"])
    rows = torch.ones(1, 2, 3, 3, 4, device=DEVICE, requires_grad=True)
    use("triton")
    nodes = _buffer([0, 0])
    y, statistics, _ = layer_train(rows, nodes, nodes, [], "[null]")
    y.sum().backward()
    assert statistics.shape == (2, 0)
    assert rows.grad.eq(2).all()


def test_only_what_is_asked_for_is_given():
    case = _Case("one", (2, 4, 2, 2), (1, [0], [1]))
    nodes, given = (case.parent, case.choice), case.parameters
    y, statistics, saved = layer_train(case.rows, *nodes, given, case.text)
    not_kept = layer_train(case.rows, *nodes, given, case.text, False)
    assert len(saved) > 0
    assert len(not_kept[2]) == 0
    assert all(map(torch.equal, not_kept[:2], (y, statistics)))
    needs = [True] * 4
    whole = layer_backward(y, case.rows, *nodes, given, statistics, saved, case.text, needs)
    needs = [False, False, True, False]
    part = layer_backward(y, case.rows, *nodes, given, statistics, saved, case.text, needs)
    assert part[0].numel() == 0
    [only] = part[1]
    assert torch.equal(only, whole[1][1])


@pytest.mark.parametrize("population", [(1, [0], [1]), (1, [0, 0], [0, -1]), (1, [], [])])
def test_gradients_may_be_added_to_what_is_there(population):
    """To the bit; a choice that no node has adds nothing, and no other tensor is made."""
    case = _Case("pair", (2, 4, 2, 2), population)
    own = plan.plan_layer(case.layer, *case.rows.shape[1:])
    given = (case.rows, case.parent, case.choice, case.parameters)
    y, statistics, saved = kernels.train(*given, own, True)
    dy = torch.randn(y.shape, generator=_generator(2)).to(DEVICE)
    d_rows, gradients = kernels.backward(dy, *given, statistics, saved, own, True)
    before = [torch.randn(p.shape, generator=_generator(3)).to(DEVICE) for p in case.parameters]
    sums, into = [p.clone() for p in before], torch.empty_like(case.rows)
    found, same = kernels.backward(dy, *given, statistics, saved, own, True, d_rows=into, sums=sums)
    assert torch.equal(found, d_rows)
    for total, returned, start, gradient in zip(sums, same, before, gradients, strict=True):
        assert returned is total
        assert torch.equal(total, start + gradient)


def test_no_nodes_and_no_images_give_no_rows():
    case = _Case("one", (2, 4, 2, 2), (1, [], []))
    found = case.trained()
    assert found["y"].shape == (0, 2, 2, 2, 4)
    assert not found["d rows"].any()
    with pytest.raises(ValueError, match="expected two values a channel"):
        layer_train(case.rows[:, :0], case.parent, case.choice, case.parameters, case.text)


def test_parameters_in_any_memory():
    case = _Case("one", (2, 4, 2, 2), (1, [0], [1]))
    expected = case.trained()
    flat = torch.cat([torch.zeros(1, device=DEVICE), *map(torch.flatten, case.parameters)])
    parts = flat[1:].split([p.numel() for p in case.parameters])
    case.parameters = [part.view(p.shape) for part, p in zip(parts, case.parameters, strict=True)]
    assert case.parameters[0].data_ptr() % 16
    y, statistics, _ = layer_train(case.rows, case.parent, case.choice, case.parameters, case.text)
    assert torch.equal(y, expected["y"])
    assert torch.equal(statistics, expected["statistics"])


# Launches


def _noting(launches):
    launch = _launch.Launch.__call__

    def note(self):
        launches.append(self)
        launch(self)

    return note


def _space_layers():
    for name in spaces.names():
        space = spaces.build(name)
        for ops in {tuple(ops): None for ops in space.blocks}:
            yield _layer(ops), ops[0].in_channels
    for ops in OPS.values():
        yield _layer(ops(8)), 8


@pytest.mark.parametrize("nodes", [1, 50])
def test_launches_are_two_more_than_the_longest_chains_convolutions(nodes, monkeypatch):
    launches = []
    monkeypatch.setattr(_launch.Launch, "__call__", lambda self: launches.append(self))
    monkeypatch.setattr(kernels, "torch", torch)
    for text, channels in _space_layers():
        layer = parse_layer(text)
        longest = max(len(c) for op in layer.ops if op for c in (op.units[: op.main],))
        longest = max(longest, *(len(op.units) - op.main for op in layer.ops if op))
        own = plan.plan_layer(layer, 2, 8, 8, channels)
        rows = torch.empty(1, 2, 8, 8, channels, device="meta")
        buffers = [torch.empty(nodes, dtype=torch.int32, device="meta") for _ in range(2)]
        given = [torch.empty(shape, device="meta") for shape in layer.shapes]
        y, statistics, saved = kernels.train(rows, *buffers, given, own, True)
        assert 0 < len(launches) <= longest + 2
        launches.clear()
        kernels.backward(y, rows, *buffers, given, statistics, saved, own, True)
        assert 0 < len(launches) <= longest + 2
        launches.clear()


@pytest.mark.parametrize("name", ["s1", "s2", "rare", "kernels"])
@pytest.mark.parametrize("dtype", list(NAMES), ids=NAMES.get)
def test_one_machine_code_serves_every_population(name, dtype, monkeypatch):
    """Whatever the nodes, the parents and their numbers, Triton specialises a launch once."""
    monkeypatch.setattr(kernels, "torch", torch)
    case = _Case(name, SHAPES["easy"], dtype=dtype)
    own = plan.plan_layer(case.layer, *case.rows.shape[1:])
    moments_floats, size = case.layer.moments_floats, (*own.out_size, own.channels[1])
    rng = np.random.default_rng(0)
    keys = set()
    for index in range(20):
        nodes, num_rows = int(rng.integers(1, 65)), int(rng.integers(1, 33))
        parent = _buffer(rng.integers(0, num_rows, nodes).tolist())
        choice = _buffer(rng.integers(-1, len(case.layer.ops), nodes).tolist())
        rows = case.rows.new_empty(num_rows, *case.rows.shape[1:])
        given = (rows, parent, choice, case.parameters)
        moments = torch.empty(nodes, moments_floats, device=DEVICE)
        if index == 0:
            kernels.address_table(case.parameters, rows.device)
        with record() as found:
            y, statistics, saved = kernels.train(*given, own, True)
            kernels.backward(y, *given, statistics, saved, own, True)
            infer.infer(*given, moments, case.layer, size)
        keys.add(tuple(launch.key for launch in found.launches))
    assert len(keys) == 1


def test_a_shortest_sequence_of_steps():
    assert plan.supersequence(["PDP", "P", "DP"]) == "PDP"
    assert plan.supersequence(["PDP", "DPDPDP"]) == "DPDPDP"
    assert len(plan.supersequence(["PDP", "DPD"])) == 4
    assert plan.supersequence([]) == ""


def test_what_is_not_on_the_device_is_not_copied_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cuda = torch.device("cuda", 0)
    layer = parse_layer(_layer(OPS["one"](4)))
    with pytest.raises(RuntimeError, match="a layer's plan is not on cuda:0 yet"):
        plan.LayerPlan(layer, 2, 3, 3, 4).tables(cuda, kept=True)
    with pytest.raises(RuntimeError, match="call the function once before the capture"):
        addresses.address_table([torch.zeros(3)], cuda)


# The operator


@interpreted
def test_what_the_kernels_do_not_have_is_the_references(use):
    case = _Case("one", (2, 4, 2, 2), (1, [0], [1]))
    rows, given = case.rows, case.parameters
    assert implementation(case.layer, rows.double(), [p.double() for p in given]) == "reference"
    assert implementation(case.layer, rows, [p.double() for p in given]) == "reference"
    unit = LayerUnit(True, 4, 4, 9, 1, True, 1e-5)
    wide = parse_layer(describe_layer([describe_op(LayerOp((unit,), 1, "plain"))]))
    assert implementation(wide, rows, []) == "reference"
    assert implementation(case.layer, rows.half(), given) == "triton"
    use("cpu")
    assert implementation(case.layer, rows, given) == "cpu"
    assert implementation(case.layer, rows.half(), given) == "reference"
    use("reference")
    assert implementation(case.layer, rows, given) == "reference"


def test_triton_says_why_it_cannot_run(use, monkeypatch):
    case = _Case("one", (2, 4, 2, 2), (1, [0], [1]))
    rows = case.rows.cpu()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="there is no CUDA device, and TRITON_INTERPRET=1"):
        implementation(case.layer, rows, case.parameters)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.backends()["triton"] is None
    with pytest.raises(ConfigError, match="rows are on a CPU, and TRITON_INTERPRET=1"):
        implementation(case.layer, rows, case.parameters)
    monkeypatch.setattr(backends, "_lacks_triton", lambda: "triton is not installed")
    with pytest.raises(ConfigError, match="triton is not installed"):
        implementation(case.layer, rows, case.parameters)


def test_buffers_of_another_type_are_refused():
    case = _Case("one", (2, 4, 2, 2), (1, [0], [1]))
    with pytest.raises(ValueError, match=r"choice: torch\.int64"):
        layer_train(case.rows, case.parent, case.choice.long(), case.parameters, case.text)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the check's own
@pytest.mark.parametrize("name", ["layer_train", "layer_backward"])
def test_pytorchs_own_check_of_operators(name, monkeypatch):
    monkeypatch.setattr(kernels, "torch", torch)
    plain = kernels._raw_rows  # what is kept has gaps that no one writes, and must compare equal
    monkeypatch.setattr(kernels, "_raw_rows", lambda *given: plain(*given).zero_())
    case = _Case("one", (2, 4, 1, 1), (1, [0], [1]))
    nodes, given = (case.parent, case.choice), case.parameters
    y, statistics, saved = layer_train(case.rows, *nodes, given, case.text)
    wanting = [p.clone().requires_grad_() for p in given]
    sample = {
        "layer_train": (case.rows.clone().requires_grad_(), *nodes, wanting, case.text),
        "layer_backward": (
            *(y, case.rows, *nodes, given, statistics, saved, case.text),
            [True, True, False, True],
        ),
    }[name]
    torch.library.opcheck(getattr(torch.ops.fastshift, name).default, sample)


def test_a_compiled_function_serves_every_population_of_a_size():
    case = _Case("one", (2, 4, 1, 1), (2, [0, 1], [1, 0]))

    def gradients(apply, parent, choice):
        rows = case.rows.clone().requires_grad_()
        given = [p.clone().requires_grad_() for p in case.parameters]
        loss, statistics = apply(rows, parent, choice, given)
        loss.backward()
        return [loss.detach(), statistics, rows.grad, *(p.grad for p in given)]

    def apply(rows, parent, choice, given):
        y, statistics, _ = layer_train(rows, parent, choice, given, case.text)
        return y.square().mean(), statistics.sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    rng = np.random.default_rng(0)
    for index in range(20):
        nodes = [_buffer(rng.integers(0, 2, 2).tolist()) for _ in range(2)]
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            found = gradients(compiled, *nodes)
        if index % 5 == 0:
            for ours, plain in zip(found, gradients(apply, *nodes), strict=True):
                expected = torch.zeros_like(ours) if plain is None else plain
                assert torch.equal(ours, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
