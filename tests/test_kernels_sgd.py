"""The kernel of SGD: the launcher against its definition, and that against our optimiser."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from block_cases import seeded
from kernel_cases import DEVICE, DTYPES, assert_near, same_bits

from fastshift.kernels import sgd
from fastshift.optim import PathSGD
from fastshift.testing import changed_tensors, micro_supernet, random_archs

pytestmark = pytest.mark.usefixtures("new_memory_is_nan")

RATES = ([0.1, 4e-2, 0.9], [0.3, 0.0, 0.0], [0.2, 0.0, 0.8])  # lr, decay, momentum of each group


def _sgd_case(dtype=torch.float32, shapes=((3, 5, 2), (1100,), (2,), (1024,), (2051,), (1,))):
    """Parameters of two pairs and of every step, in three groups."""
    generator = seeded()
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
            gradient.copy_(torch.randn(gradient.shape, generator=seeded(step)))
        given = (parameters, gradients, momenta, tables, used, 0.7, nesterov)
        own, exact = (_sgd_reference(t, *given) for t in (torch.float32, torch.float64))
        before = [t.clone() for t in (*parameters, *momenta)]
        _sgd_triton(parameters, gradients, momenta, tables, used, scale=0.7, nesterov=nesterov)
        for found, ours, true in zip(
            [*parameters, *momenta], [*own[0], *own[1]], [*exact[0], *exact[1]], strict=True
        ):
            assert_near(found, ours, true)
        moved = [
            not torch.equal(a, b) for a, b in zip(before, [*parameters, *momenta], strict=True)
        ]
        samples = [pair < 0 or bool(used[pair]) for pair in pairs]
        has_momentum = [bool(RATES[group][2]) for group in groups]
        assert moved == samples + [a and b for a, b in zip(samples, has_momentum, strict=True)]


def _bits(tensors):
    return [t.clone().view(torch.int32) for t in tensors]


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
        assert same_bits(before, _bits(own))
        assert parameters[0].isnan().any()


def test_nothing_moves_where_the_coefficient_is_not_finite():
    parameters, gradients, momenta, pairs, groups = _sgd_case()
    tables = sgd.sgd_tables(parameters, gradients, momenta, pairs, groups)
    before = _bits([*parameters, *momenta])
    for scale in (float("nan"), float("inf"), -float("inf")):
        _sgd_triton(parameters, gradients, momenta, tables, [1, 1], scale=scale)
        assert same_bits(before, _bits([*parameters, *momenta]))
    own = _sgd_reference(
        torch.float32, parameters, gradients, momenta, tables, [1, 1], float("nan"), False
    )
    assert same_bits(before, _bits([*own[0], *own[1]]))


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
        x = torch.randn(6, 3, 8, 8, generator=seeded(step))
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
    assert same_bits(_bits(sgd.fresh_momenta(untouched)), _bits(untouched))


def test_the_first_momentum_is_the_gradient_down_to_the_sign_of_zero():
    parameters = [torch.ones(4, device=DEVICE)]
    gradients = [torch.tensor([0.0, -0.0, 1.0, -2.0], device=DEVICE)]
    momenta = sgd.fresh_momenta(parameters)
    tables = sgd.sgd_tables(parameters, gradients, momenta, [-1], [0])
    _sgd_triton(parameters, gradients, momenta, tables, [0], [[0.1, 0.0, 0.9]])
    assert same_bits(_bits(gradients), _bits(momenta))


def test_tensors_may_lie_anywhere_and_have_their_dimensions_in_any_order():
    shape = (4, 6, 3, 3)
    storage = [torch.randn(4 * 6 * 9 + 1, generator=seeded(s)).to(DEVICE) for s in range(3)]
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
    assert_near(lists[0][0], own[0][0], exact[0][0])
    assert_near(momenta[0], own[1][0], exact[1][0])
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
