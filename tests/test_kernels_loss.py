"""The loss kernels: the launchers against their definitions, and those against PyTorch."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", minversion="3.6")

from block_cases import seeded
from kernel_cases import DEVICE, DTYPES, assert_near, same_bits

from fastshift.kernels import loss
from fastshift.testing import FLOAT64_TOLERANCE

pytestmark = pytest.mark.usefixtures("new_memory_is_nan")

SLOW = [pytest.mark.slow]

LOSS_SHAPES = {"easy": (3, 16, 16), "odd": (4, 37, 11), "tiny": (1, 1, 1), "wide": (2, 3, 4100)}


QUICK = {("wide", torch.float32, 0.1), ("odd", torch.bfloat16, 0.1), ("odd", torch.float32, 0.0)}
LOSS_GRID = [
    pytest.param(*case, marks=[] if case[0] in ("easy", "tiny") or case in QUICK else SLOW)
    for case in product(LOSS_SHAPES, DTYPES, (0.0, 0.1))
]


def _loss_case(shape, dtype=torch.float32, leaves=None, scale=3.0):
    candidates, num_images, num_classes = shape
    logits = (scale * torch.randn(shape, generator=seeded())).to(dtype)
    labels = torch.randint(num_classes, (num_images,), generator=seeded(1))
    d_losses = torch.randn(candidates, generator=seeded(2))
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
    assert_near(losses, own, exact)
    assert torch.equal(wrong.cpu(), own_wrong)
    d_logits = _loss_gradient_triton(d_losses, logits, labels, leaves, smoothing)
    assert_near(
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
    plain = torch.randn(6, 9, 5, generator=seeded())
    views = {
        "every other candidate": plain[::2],
        "candidates innermost": plain.permute(2, 0, 1),
        "one for all": plain[:1].expand(3, 9, 5),
        "part of the classes": plain[:, :, 1:4],
    }
    for name, view in views.items():
        labels = torch.randint(view.shape[2], (view.shape[1],), generator=seeded(1))
        leaves = torch.tensor([len(view)], dtype=torch.int32)
        d_losses = torch.randn(len(view), generator=seeded(2))
        plain_view = view.clone(memory_format=torch.contiguous_format)
        found, expected = (
            [*_loss_triton(x, labels, leaves), _loss_gradient_triton(d_losses, x, labels, leaves)]
            for x in (view, plain_view)
        )
        assert same_bits(found, expected), name


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
        assert_near(found, own, loss.candidate_loss_ref(far.double(), labels, leaves, smoothing)[0])


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
