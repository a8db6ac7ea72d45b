"""Loss, SGD and image kernels: the launchers against their definitions, and those against ours."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from catalogue import record

from fastshift.data.batches import Augmentation, Normalisation
from fastshift.kernels import images, loss, sgd
from fastshift.optim import PathSGD
from fastshift.testing import FLOAT64_TOLERANCE, changed_tensors, micro_supernet, random_archs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # "cpu" is Triton's interpreter
SLOW = [pytest.mark.slow]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of a relative error by norm against float64, where twice the reference's own is smaller.
FLOORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(monkeypatch):
    plain = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _assert_near(found, own, exact):
    """Twice the error of the reference in the kernel's type, or the type's floor."""
    assert found.dtype is own.dtype
    size = float(exact.norm())
    errors = [float((x.cpu().double() - exact).norm()) for x in (found, own)]
    bound = max(2 * errors[1], FLOORS[found.dtype] * size)
    assert errors[0] <= bound, f"error {errors[0]:.3g} of {size:.3g}; expected {bound:.3g}"


# Loss

LOSS_SHAPES = {"easy": (3, 16, 16), "odd": (4, 37, 11), "tiny": (1, 1, 1), "wide": (2, 3, 4100)}


QUICK = {("wide", torch.float32, 0.1), ("odd", torch.bfloat16, 0.1), ("odd", torch.float32, 0.0)}
LOSS_GRID = [
    pytest.param(*case, marks=[] if case[0] in ("easy", "tiny") or case in QUICK else SLOW)
    for case in product(LOSS_SHAPES, DTYPES, (0.0, 0.1))
]


def _loss_case(shape, dtype=torch.float32, leaves=None, scale=3.0):
    candidates, num_images, num_classes = shape
    logits = (scale * torch.randn(shape, generator=_generator())).to(dtype)
    labels = torch.randint(num_classes, (num_images,), generator=_generator(1))
    d_losses = torch.randn(candidates, generator=_generator(2))
    leaves = torch.tensor([candidates if leaves is None else leaves], dtype=torch.int32)
    return logits, labels, leaves, d_losses


def _loss_triton(logits, labels, leaves, smoothing=0.0):
    given = (x.to(DEVICE) for x in (logits, labels, leaves))
    return loss._loss_fwd_triton(*given, smoothing)


def _loss_gradient_triton(d_losses, logits, labels, leaves, smoothing=0.0):
    given = (x.to(DEVICE) for x in (d_losses, logits, labels, leaves))
    return loss._loss_bwd_triton(*given, smoothing)


@pytest.mark.parametrize(("shape", "dtype", "smoothing"), LOSS_GRID, ids=str)
def test_losses_counts_and_gradients_are_those_of_float64(shape, dtype, smoothing):
    logits, labels, leaves, d_losses = _loss_case(LOSS_SHAPES[shape], dtype)
    losses, wrong = _loss_triton(logits, labels, leaves, smoothing)
    own, own_wrong = loss.candidate_loss_ref(logits, labels, leaves, smoothing)
    exact, _ = loss.candidate_loss_ref(logits.double(), labels, leaves, smoothing)
    _assert_near(losses, own, exact)
    assert torch.equal(wrong.cpu(), own_wrong)
    d_logits = _loss_gradient_triton(d_losses, logits, labels, leaves, smoothing)
    _assert_near(
        d_logits,
        loss.candidate_loss_backward_ref(d_losses, logits, labels, leaves, smoothing),
        loss.candidate_loss_backward_ref(d_losses, logits.double(), labels, leaves, smoothing),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_reference_is_the_sum_of_torchs_cross_entropies(smoothing):
    logits, labels, leaves, d_losses = _loss_case((4, 37, 11))
    logits = logits.double().requires_grad_()
    losses, wrong = loss.candidate_loss(logits, labels, leaves, label_smoothing=smoothing)
    expected = torch.stack(
        [
            functional.cross_entropy(x, labels, label_smoothing=smoothing, reduction="sum")
            for x in logits
        ]
    )
    assert torch.allclose(losses, expected, rtol=FLOAT64_TOLERANCE)
    assert torch.equal(wrong, (logits.argmax(dim=2) != labels).sum(dim=1))
    gradients = [torch.autograd.grad((y * d_losses).sum(), logits)[0] for y in (losses, expected)]
    assert torch.allclose(*gradients, rtol=FLOAT64_TOLERANCE, atol=1e-12)


def _counts(logits, labels):
    logits = torch.tensor([logits])
    leaves = torch.tensor([1], dtype=torch.int32)
    labels = torch.tensor(labels)
    found = _loss_triton(logits, labels, leaves)
    return [
        (losses.item(), int(wrong))
        for losses, wrong in (found, loss.candidate_loss_ref(logits, labels, leaves, 0.0))
    ]


def test_of_equal_logits_the_first_is_the_answer(monkeypatch):
    for tile in (4096, 2):  # in one block of classes, and over several
        monkeypatch.setattr(loss, "_TILE", tile)
        for label, wrong in ((0, 1), (1, 0), (2, 1), (3, 1)):
            found = _counts([[0.0, 2.0, 2.0, 2.0]], [label])
            assert [count for _, count in found] == [wrong, wrong]


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
def test_what_is_no_number_counts_as_wrong_and_makes_the_loss_none():
    nan, inf = float("nan"), float("inf")
    for logits in ([nan, 0.0, 0.0], [0.0, nan, 0.0], [nan, nan, nan]):
        for label in range(3):
            assert [(str(a), b) for a, b in _counts([logits], [label])] == [("nan", 1)] * 2
    for logits, label, wrong in (
        ([inf, 0.0], 0, 0),
        ([inf, 0.0], 1, 1),
        ([-inf, -inf], 0, 0),
        ([inf, inf], 1, 1),
    ):
        assert [(str(a), b) for a, b in _counts([logits], [label])] == [("nan", wrong)] * 2
    for label, value in ((0, 0.0), (1, inf)):
        assert _counts([[0.0, -inf]], [label]) == [(value, label)] * 2
    for label in (-1, 2, -100):
        assert [(str(a), b) for a, b in _counts([[0.0, 1.0]], [label])] == [("nan", 1)] * 2


def test_candidates_behind_the_leaves_give_zeros_and_are_not_read():
    logits, labels, leaves, d_losses = _loss_case((4, 5, 7), leaves=2)
    logits[2:] = torch.nan
    losses, wrong = _loss_triton(logits, labels, leaves, 0.1)
    d_logits = _loss_gradient_triton(d_losses, logits, labels, leaves, 0.1)
    assert losses[:2].isfinite().all()
    assert d_logits[:2].all()
    assert not any(x[2:].any() for x in (losses, wrong, d_logits))
    losses, wrong = loss.candidate_loss_ref(logits, labels, leaves, 0.1)
    d_logits = loss.candidate_loss_backward_ref(d_losses, logits, labels, leaves, 0.1)
    assert not any(x[2:].any() for x in (losses, wrong, d_logits))


def test_logits_may_have_any_strides():
    plain = torch.randn(6, 9, 5, generator=_generator())
    views = {
        "every other candidate": plain[::2],
        "candidates innermost": plain.permute(2, 0, 1),
        "one for all": plain[:1].expand(3, 9, 5),
        "part of the classes": plain[:, :, 1:4],
    }
    for name, view in views.items():
        labels = torch.randint(view.shape[2], (view.shape[1],), generator=_generator(1))
        leaves = torch.tensor([len(view)], dtype=torch.int32)
        d_losses = torch.randn(len(view), generator=_generator(2))
        plain_view = view.clone(memory_format=torch.contiguous_format)
        found, expected = (
            [*_loss_triton(x, labels, leaves), _loss_gradient_triton(d_losses, x, labels, leaves)]
            for x in (view, plain_view)
        )
        assert _equal(found, expected), name


def test_a_loss_does_not_depend_on_the_other_candidates_and_repeats_bit_for_bit():
    logits, labels, leaves, _ = _loss_case((3, 37, 11))
    together, _ = _loss_triton(logits, labels, leaves, 0.1)
    assert torch.equal(together, _loss_triton(logits, labels, leaves, 0.1)[0])
    one = torch.tensor([1], dtype=torch.int32)
    alone = [_loss_triton(x[None], labels, one, 0.1)[0] for x in logits]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.skipif(DEVICE == "cuda", reason="needs Triton's interpreter")
def test_no_bit_of_a_loss_depends_on_the_order_of_programs(last_program_first):
    case = _loss_case((4, 37, 11))[:3]
    found = _loss_triton(*case)
    last_program_first()
    assert all(map(torch.equal, _loss_triton(*case), found))


def test_losses_of_far_away_logits_lose_nothing():
    logits, labels, leaves, _ = _loss_case((2, 8, 40))
    far = logits + 1024.0  # a power of two: what it rounds away, all three see
    for smoothing in (0.0, 0.1):
        found, _ = _loss_triton(far, labels, leaves, smoothing)
        own, _ = loss.candidate_loss_ref(far, labels, leaves, smoothing)
        _assert_near(
            found, own, loss.candidate_loss_ref(far.double(), labels, leaves, smoothing)[0]
        )


SCHEMA = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL_CHECKS = (*SCHEMA, "test_aot_dispatch_dynamic")


# PyTorch's own check asks tensors for gradients that they do not have.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("checks", [SCHEMA, pytest.param(ALL_CHECKS, marks=SLOW)], ids=len)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_loss_passes_opcheck(dtype, checks):
    logits, labels, leaves, d_losses = _loss_case((2, 3, 4), dtype)
    wide = torch.promote_types(dtype, torch.float32)
    logits.requires_grad_()
    operators = torch.ops.fastshift
    given = (logits, labels, leaves, 0.1)
    torch.library.opcheck(operators.candidate_loss, given, test_utils=checks)
    given = (d_losses.to(wide), logits.detach(), labels, leaves, 0.1)
    torch.library.opcheck(operators.candidate_loss_backward, given, test_utils=checks)


def test_the_loss_compiles_whole_and_checks_its_gradient():
    logits, labels, leaves, _ = _loss_case((2, 3, 4))
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: loss.candidate_loss(x, labels, leaves, label_smoothing=0.1)[0], logits
    )
    compiled = torch.compile(loss.candidate_loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        compiled(logits, labels, leaves), loss.candidate_loss(logits, labels), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"logits": torch.zeros(2, 3)}, "logits"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.int32)}, "logits"),
        ({"logits": torch.zeros(0, 3, 4)}, "logits"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "labels"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels"),
        ({"num_leaves": torch.zeros(1, dtype=torch.int64)}, "num_leaves"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"label_smoothing": float("nan")}, "label_smoothing"),
    ],
)
def test_the_loss_refuses_what_does_not_fit(change, name):
    given = {"logits": torch.zeros(2, 3, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^{name}: "):
        loss.candidate_loss(**{**given, **change})


# SGD

RATES = ([0.1, 4e-2, 0.9], [0.3, 0.0, 0.0], [0.2, 0.0, 0.8])  # lr, decay, momentum of each group


def _sgd_case(dtype=torch.float32, shapes=((3, 5, 2), (1100,), (2,), (1024,), (2051,), (1,))):
    """Parameters of two pairs and of every step, in three groups."""
    generator = _generator()
    parameters = [torch.randn(s, generator=generator).to(DEVICE) for s in shapes]
    gradients = [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]
    pairs = [0, 1, -1, 1, 0, -1][: len(shapes)]
    groups = [0, 0, 1, 2, 0, 2][: len(shapes)]
    return parameters, gradients, sgd.fresh_momenta(parameters), pairs, groups


def _sgd_triton(
    parameters, gradients, momenta, tables, used, rates=RATES, scale=1.0, nesterov=False
):
    sgd._sgd_triton(
        parameters,
        gradients,
        momenta,
        *(tables.addresses, tables.layout, tables.pieces),
        torch.tensor(used, dtype=torch.uint8, device=DEVICE),
        torch.tensor(rates, device=DEVICE),
        torch.tensor([scale], device=DEVICE),
        nesterov,
        tables.aligned,
    )


def _sgd_reference(dtype, parameters, gradients, momenta, tables, used, scale, nesterov):
    """Parameters and momenta after a step of the definition in a type, on copies."""
    wide = [[t.detach().cpu().to(dtype) for t in ts] for ts in (parameters, gradients, momenta)]
    if dtype is torch.float32:
        wide = [[t.clone() for t in ts] for ts in wide]
    sgd.sgd_step_ref(
        *wide,
        tables.addresses,
        tables.layout,
        tables.pieces,
        torch.tensor(used),
        torch.tensor(RATES, dtype=torch.float32).to(dtype),
        torch.tensor([scale], dtype=torch.float32).to(dtype),
        nesterov,
        tables.aligned,
    )
    return wide[0], wide[2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_is_that_of_float64_for_gradients_of_every_type(dtype, nesterov):
    parameters, gradients, momenta, pairs, groups = _sgd_case(dtype)
    tables = sgd.sgd_tables(parameters, gradients, momenta, pairs, groups)
    for step, used in enumerate(([1, 0], [1, 1], [0, 1])):
        for gradient in gradients:
            gradient.copy_(torch.randn(gradient.shape, generator=_generator(step)))
        given = (parameters, gradients, momenta, tables, used, 0.7, nesterov)
        own, exact = (_sgd_reference(t, *given) for t in (torch.float32, torch.float64))
        before = [t.clone() for t in (*parameters, *momenta)]
        _sgd_triton(parameters, gradients, momenta, tables, used, scale=0.7, nesterov=nesterov)
        for found, ours, true in zip(
            [*parameters, *momenta], [*own[0], *own[1]], [*exact[0], *exact[1]], strict=True
        ):
            _assert_near(found, ours, true)
        moved = [
            not torch.equal(a, b) for a, b in zip(before, [*parameters, *momenta], strict=True)
        ]
        samples = [pair < 0 or bool(used[pair]) for pair in pairs]
        has_momentum = [bool(RATES[group][2]) for group in groups]
        assert moved == samples + [a and b for a, b in zip(samples, has_momentum, strict=True)]


def _bits(tensors):
    return [t.clone().view(torch.int32) for t in tensors]


def _equal(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_is_not_sampled_stays_bit_identical_whatever_its_gradient():
    for kernel in (True, False):
        parameters, gradients, momenta, pairs, groups = _sgd_case()
        for t in (*gradients, parameters[1]):
            t[0] = torch.nan
        parameters[3].view(torch.int32)[0] = 0x7FC01234  # a NaN with a payload
        momenta[3].fill_(-0.0)
        tables = sgd.sgd_tables(parameters, gradients, momenta, pairs, groups)
        kept = [i for i, pair in enumerate(pairs) if pair == 1]
        own = [x[i] for x in (parameters, momenta) for i in kept]
        before = _bits(own)
        if kernel:
            _sgd_triton(parameters, gradients, momenta, tables, [1, 0])
        else:
            used = torch.tensor([1, 0], dtype=torch.uint8)
            rates = torch.tensor(RATES)
            cpu = [[t.cpu() for t in ts] for ts in (parameters, gradients, momenta)]
            sgd.sgd_step_ref(
                *cpu, tables.addresses, tables.layout, tables.pieces,
                used, rates, torch.ones(1), False, tables.aligned,
            )  # fmt: skip
        assert _equal(before, _bits(own))
        assert parameters[0].isnan().any()


def test_nothing_moves_where_the_coefficient_is_not_finite():
    parameters, gradients, momenta, pairs, groups = _sgd_case()
    tables = sgd.sgd_tables(parameters, gradients, momenta, pairs, groups)
    before = _bits([*parameters, *momenta])
    for scale in (float("nan"), float("inf"), -float("inf")):
        _sgd_triton(parameters, gradients, momenta, tables, [1, 1], scale=scale)
        assert _equal(before, _bits([*parameters, *momenta]))
    own = _sgd_reference(
        torch.float32, parameters, gradients, momenta, tables, [1, 1], float("nan"), False
    )
    assert _equal(before, _bits([*own[0], *own[1]]))


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "weight_decay": 4e-3},
        {"momentum": 0.0, "weight_decay": 4e-3},
        {"momentum": 0.8, "weight_decay": 0.0, "nesterov": True},
    ],
)
@pytest.mark.parametrize("kernel", [False, True])
def test_steps_are_those_of_our_optimiser(settings, kernel):
    nets = micro_supernet(dropout=0.0), micro_supernet(dropout=0.0)
    optimizer = PathSGD(nets[0], 0.05, head_lr_multiplier=2.0, **settings)
    named = dict(nets[1].named_parameters())
    choices = sorted({n.rsplit(".")[1:3] and ".".join(n.split(".")[:3])
                      for n in named if n.startswith("blocks")})  # fmt: skip
    pairs = [
        choices.index(".".join(n.split(".")[:3])) if n.startswith("blocks") else -1 for n in named
    ]
    groups = [2 * n.startswith("head") + (p.dim() > 1) for n, p in named.items()]
    parameters = [p.detach().to(DEVICE) for p in named.values()] if kernel else list(named.values())
    if kernel and DEVICE == "cpu":
        parameters = [p.detach() for p in parameters]  # of the same memory
    gradients = [torch.zeros_like(p, requires_grad=False) for p in parameters]
    momenta = sgd.fresh_momenta(parameters)
    tables = sgd.sgd_tables(parameters, gradients, momenta, pairs, groups)
    momentum, decay = settings["momentum"], settings["weight_decay"]
    for step, arch in enumerate(random_archs(nets[0].space, 5, seed=1)):
        lr = 0.05 / (1 + step)
        x = torch.randn(6, 3, 8, 8, generator=_generator(step))
        optimizer.zero_grad(set_to_none=True)
        nets[0].train()(x, arch).square().sum().backward()
        used = [0] * len(choices)
        for name, own in nets[0].named_parameters():
            index = list(named).index(name)
            if own.grad is None:
                gradients[index].fill_(torch.nan)
                continue
            gradients[index].copy_(own.grad)
            if pairs[index] >= 0:
                used[pairs[index]] = 1
        optimizer.set_lr(lr)
        optimizer.step()
        rates = [[scale * lr, d, momentum] for scale in (1.0, 2.0) for d in (0.0, decay)]
        nesterov = settings.get("nesterov", False)
        if kernel:
            _sgd_triton(parameters, gradients, momenta, tables, used, rates, nesterov=nesterov)
        else:
            sgd.sgd_step(
                parameters, gradients, momenta, tables, torch.tensor(used, dtype=torch.uint8),
                torch.tensor(rates), torch.ones(1), nesterov=nesterov,
            )  # fmt: skip
    found = dict(zip(named, parameters, strict=True))
    own = optimizer.momenta()
    moved = {name: m for name, m in zip(named, momenta, strict=True) if name in own}
    if kernel:
        for name, p in nets[0].named_parameters():
            assert torch.allclose(found[name].cpu(), p, rtol=1e-5, atol=1e-6), name
    else:
        assert changed_tensors(found, dict(nets[0].named_parameters())) == set()
        assert changed_tensors(moved, own) == set()
    untouched = [m for n, m in zip(named, momenta, strict=True) if n not in own]
    assert _equal(_bits(sgd.fresh_momenta(untouched)), _bits(untouched))


def test_the_first_momentum_is_the_gradient_down_to_the_sign_of_zero():
    parameters = [torch.ones(4, device=DEVICE)]
    gradients = [torch.tensor([0.0, -0.0, 1.0, -2.0], device=DEVICE)]
    momenta = sgd.fresh_momenta(parameters)
    tables = sgd.sgd_tables(parameters, gradients, momenta, [-1], [0])
    _sgd_triton(parameters, gradients, momenta, tables, [0], [[0.1, 0.0, 0.9]])
    assert _equal(_bits(gradients), _bits(momenta))


def test_tensors_may_lie_anywhere_and_have_their_dimensions_in_any_order():
    shape = (4, 6, 3, 3)
    storage = [torch.randn(4 * 6 * 9 + 1, generator=_generator(s)).to(DEVICE) for s in range(3)]
    lists = [[s[1:].view(4, 3, 3, 6).permute(0, 3, 1, 2)] for s in storage]
    assert lists[0][0].shape == shape
    momenta = lists[2]
    tables = sgd.sgd_tables(*lists, [-1], [0])
    assert not tables.aligned
    own, exact = (
        _sgd_reference(t, *lists, tables, [0], 1.0, False) for t in (torch.float32, torch.float64)
    )
    first = [s[0].item() for s in storage]
    _sgd_triton(*lists, tables, [0])
    _assert_near(lists[0][0], own[0][0], exact[0][0])
    _assert_near(momenta[0], own[1][0], exact[1][0])
    assert first == [s[0].item() for s in storage]


def test_autograd_learns_that_a_step_changed_the_parameters():
    parameters, gradients, momenta, pairs, groups = _sgd_case()
    tables = sgd.sgd_tables(parameters, gradients, momenta, pairs, groups)
    before = [t._version for t in (*parameters, *momenta)]
    _sgd_triton(parameters, gradients, momenta, tables, [1, 1])
    assert all(t._version > v for t, v in zip((*parameters, *momenta), before, strict=True))


def test_the_step_passes_opcheck():
    parameters, gradients, momenta, pairs, groups = _sgd_case()
    tables = sgd.sgd_tables(parameters, gradients, momenta, pairs, groups)
    buffers = [torch.ones(2, dtype=torch.uint8), torch.tensor(RATES), torch.ones(1)]
    given = (tables.addresses, tables.layout, tables.pieces, *(b.to(DEVICE) for b in buffers))
    torch.library.opcheck(
        torch.ops.fastshift.sgd_step,
        (parameters, gradients, momenta, *given, False, tables.aligned),
        # Addresses lead to the tensors of the tables alone, not to the check's copies.
        test_utils=["test_schema", "test_faketensor"] if DEVICE == "cpu" else ["test_faketensor"],
    )


def test_the_step_refuses_what_does_not_fit():
    parameters, gradients, momenta, pairs, groups = _sgd_case()
    for change, match in (
        ({"pairs": pairs[:-1]}, "entries"),
        ({"parameters": []}, "entries"),
        ({"pairs": [-2] * 6}, "at least -1"),
        ({"groups": [-1] * 6}, "at least -1 and 0"),
        ({"momenta": [m.double() for m in momenta]}, "parameter 0: types"),
        ({"gradients": [g.to(torch.int32) for g in gradients]}, "parameter 0: types"),
        ({"gradients": [*gradients[:1], gradients[1].half(), *gradients[2:]]}, "parameter 1"),
        ({"momenta": [momenta[0].mT, *momenta[1:]]}, "parameter 0: shapes"),
        ({"gradients": [torch.zeros(2, 5, 3).to(DEVICE).transpose(0, 2), *gradients[1:]]}, "0: sh"),
    ):
        given = {
            "parameters": parameters,
            "gradients": gradients,
            "momenta": momenta,
            "pairs": pairs,
            "groups": groups,
        }
        with pytest.raises(ValueError, match=match):
            sgd.sgd_tables(**{**given, **change})
    gapped = [torch.zeros(4, 4)[:, :2]]
    with pytest.raises(ValueError, match="dense"):
        sgd.sgd_tables(gapped, gapped, gapped, [0], [0])
    tables = sgd.sgd_tables(parameters, gradients, momenta, pairs, groups)
    given = {
        "used": torch.ones(2, dtype=torch.uint8),
        "rates": torch.tensor(RATES),
        "coefficient": torch.ones(1),
    }
    for change, match in (
        ({"used": torch.ones(2)}, "^used: "),
        ({"used": torch.ones(0, dtype=torch.uint8)}, "^used, rates"),
        ({"rates": torch.ones(3, 2)}, "^used, rates"),
        ({"rates": torch.ones(3, 3).double()}, "^rates: "),
        ({"coefficient": torch.tensor(1.0)}, "^coefficient: "),
        ({"coefficient": torch.ones(2)}, "^used, rates, coefficient"),
    ):
        with pytest.raises(ValueError, match=match):
            sgd.sgd_step(parameters, gradients, momenta, tables, **{**given, **change})
    with pytest.raises(ValueError, match=r"^parameters: 5"):
        sgd.sgd_step(parameters[:5], gradients[:5], momenta[:5], tables, **given)


# Images

IMAGE_SHAPES = {"easy": (3, 3, 8, 8), "odd": (2, 3, 21, 19), "tiny": (1, 1, 1, 1)}


def _images_case(shape, padding):
    """Images, draws, and what the CPU's augmentation and normalisation make of them."""
    num, channels = shape[:2]
    pixels = torch.randint(256, shape, generator=_generator(), dtype=torch.uint8)
    fill = tuple(range(100, 100 + channels))
    normalise = Normalisation((0.49, 0.48, 0.45)[:channels], (0.25, 0.24, 0.26)[:channels])
    augmentation = Augmentation(padding=padding, fill=fill, flip=True)
    expected = normalise(augmentation(pixels.clone(), np.random.default_rng(5)))
    rng = np.random.default_rng(5)
    corners = rng.integers(2 * padding + 1, size=(2, num)) if padding else np.zeros((2, num))
    flips = rng.random(num) < 0.5
    scale = torch.tensor([1 / (255 * std) for std in normalise.std])
    means = zip(normalise.mean, normalise.std, strict=True)
    shift = torch.tensor([-mean / std for mean, std in means])
    buffers = (
        torch.from_numpy(corners).to(torch.int32),
        torch.from_numpy(flips).to(torch.uint8),
        torch.tensor(fill, dtype=torch.uint8),
        scale,
        shift,
    )
    return pixels, buffers, expected


def _images_triton(pixels, buffers, padding, dtype=torch.float32):
    moved = (b.to(DEVICE) for b in (pixels, *buffers))
    return images._images_triton(*moved, padding, dtype)


@pytest.mark.parametrize("planar", [True, False], ids=["planar", "channels last"])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("shape", IMAGE_SHAPES)
def test_images_are_those_of_the_cpus_augmentation(shape, padding, planar):
    pixels, buffers, expected = _images_case(IMAGE_SHAPES[shape], padding)
    if not planar:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    reference = images.augment_images(pixels, *buffers, padding=padding)
    assert torch.equal(reference, expected)
    found = _images_triton(pixels, buffers, padding)
    # A fused multiply-add rounds once where the CPU rounds twice: at the size of its terms, 2.
    assert torch.allclose(found.cpu(), expected, rtol=0, atol=2.0**-22)
    for out in (reference, found):
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert out.stride() == images._images_fake(pixels, *buffers, padding, out.dtype).stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", IMAGE_SHAPES)
def test_narrow_images_are_the_rounded_ones(shape, dtype):
    pixels, buffers, expected = _images_case(IMAGE_SHAPES[shape], 2)
    reference = images.augment_images(pixels, *buffers, padding=2, dtype=dtype)
    assert torch.equal(reference, expected.to(dtype))
    found = _images_triton(pixels, buffers, 2, dtype)
    # Triton's interpreter cuts bfloat16 off where a device rounds: a whole last place.
    assert torch.allclose(found.cpu().float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_pixel_lands_where_the_formula_says():
    pixels = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4)
    one, zero = torch.ones(1), torch.zeros(1)
    fill = torch.tensor([99], dtype=torch.uint8)
    for corner, flip, rows in (
        ((1, 1), 0, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        ((1, 1), 1, [[3, 2, 1, 0], [7, 6, 5, 4], [11, 10, 9, 8]]),
        ((0, 1), 0, [[99] * 4, [0, 1, 2, 3], [4, 5, 6, 7]]),
        ((2, 0), 1, [[6, 5, 4, 99], [10, 9, 8, 99], [99] * 4]),
    ):
        corners = torch.tensor(corner, dtype=torch.int32).view(2, 1)
        buffers = corners, torch.tensor([flip], dtype=torch.uint8), fill, one, zero
        for found in (
            images.augment_images(pixels, *buffers, padding=1),
            _images_triton(pixels, buffers, 1).cpu(),
        ):
            assert found[0, 0].tolist() == rows


def test_a_launch_may_have_more_images_or_candidates_than_a_second_axis_has_programs():
    """Only along the first one there may be more than 65535."""
    many = 70_000
    pixels = torch.empty(many, 3, 8, 8, dtype=torch.uint8, device="meta")
    buffers = [torch.empty(*size, device="meta") for size in ((2, many), (many,), (3,), (3,), (3,))]
    logits, labels = torch.empty(many, 3, 5, device="meta"), torch.empty(3, device="meta")
    leaves, slopes = torch.empty(1, device="meta"), torch.empty(many, device="meta")
    with record() as found:
        images._images_triton(pixels, *buffers, 1, torch.float32)
        loss._loss_fwd_triton(logits, labels, leaves, 0.0)
        loss._loss_bwd_triton(slopes, logits, labels, leaves, 0.0)
    assert len(found.launches) == 3
    for launch in found.launches:
        assert launch.grid[0] >= many
        assert launch.grid[1:] == (1, 1)


def test_the_images_pass_opcheck():
    pixels, buffers, _ = _images_case((2, 3, 4, 4), 1)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.fastshift.augment_images, (pixels, *buffers, 1, dtype))


def test_the_images_refuse_what_does_not_fit():
    pixels, buffers, _ = _images_case((2, 3, 4, 4), 1)
    names = ("corners", "flips", "fill", "scale", "shift")
    given = {"images": pixels, "padding": 1, **dict(zip(names, buffers, strict=True))}
    for change, name in (
        ({"images": pixels.float()}, "images"),
        ({"images": pixels[0]}, "images"),
        ({"images": pixels[:0]}, "images"),
        ({"corners": buffers[0].T}, "corners"),
        ({"flips": buffers[1].bool()}, "flips"),
        ({"fill": buffers[2][:1]}, "fill"),
        ({"scale": buffers[3].double()}, "scale"),
        ({"shift": torch.ones(6)[::2]}, "shift"),
        ({"padding": -1}, "padding, dtype"),
        ({"dtype": torch.float64}, "padding, dtype"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            images.augment_images(**{**given, **change})
