from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from fastshift.optim import PathSGD
from fastshift.testing import (
    changed_tensors,
    micro_supernet,
    random_archs,
    synthetic_data,
)

SETTINGS = [
    {"momentum": 0.9, "weight_decay": 4e-3},
    {"momentum": 0.0, "weight_decay": 4e-3},
    {"momentum": 0.8, "weight_decay": 0.0, "nesterov": True},
]


def _backward(net, arch, step):
    images, labels = synthetic_data().train.batch(step, 6)
    images = images.to(next(net.parameters()).dtype)
    functional.cross_entropy(net.train()(images, arch), labels).backward()


def _plain(net, lr, zeros=False, **settings):
    """`torch.optim.SGD` with weight decay on matrices only."""
    decay = settings.pop("weight_decay")
    groups = [
        {"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in net.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, **settings)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_equals_torchs_sgd_on_the_sampled_parameters(settings):
    net, plain = micro_supernet(dropout=0.0), micro_supernet(dropout=0.0)
    optimizer, reference = PathSGD(net, 0.05, **settings), _plain(plain, 0.05, **settings)
    for step, arch in enumerate(random_archs(net.space, 5, seed=1)):
        for one, its in ((net, optimizer), (plain, reference)):
            its.zero_grad(set_to_none=True)
            _backward(one, arch, step)
            its.step()
    assert changed_tensors(net.state_dict(), plain.state_dict()) == set()
    assert changed_tensors(net.state_dict(), micro_supernet().state_dict())


def test_parameters_and_momenta_of_unsampled_ops_stay_bit_for_bit():
    net = micro_supernet()
    optimizer = PathSGD(net, 0.05)
    for step in range(2):
        _backward(net, "121", step)
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    momenta = {name: value.clone() for name, value in optimizer.momenta().items()}
    assert set(momenta) == {
        name
        for name in weights
        if name.startswith(("stem", "head", "blocks.0.1", "blocks.1.2", "blocks.2.1"))
    }
    _backward(net, "100", 2)
    optimizer.step()
    moved = changed_tensors(weights, dict(net.named_parameters()))
    assert moved == {n for n in weights if n.startswith(("stem", "head", "blocks.0.1"))}
    assert changed_tensors(momenta, optimizer.momenta()) == moved


@pytest.mark.parametrize("settings", SETTINGS)
def test_drift_is_sgd_fed_with_zero_gradients(settings):
    net, plain = micro_supernet(dropout=0.0), micro_supernet(dropout=0.0)
    optimizer = PathSGD(net, 0.05, drift=True, **settings)
    reference = _plain(plain, 0.05, **settings)
    for step, arch in enumerate(["121", "002", "210", "000"]):
        optimizer.zero_grad(set_to_none=True)
        _backward(net, arch, step)
        optimizer.step()
        for p in plain.parameters():
            p.grad = torch.zeros_like(p)
        _backward(plain, arch, step)
        reference.step()
    assert changed_tensors(net.state_dict(), plain.state_dict()) == set()
    still = micro_supernet(dropout=0.0)
    optimizer = PathSGD(still, 0.05, **settings)
    for step, arch in enumerate(["121", "002", "210", "000"]):
        optimizer.zero_grad(set_to_none=True)
        _backward(still, arch, step)
        optimizer.step()
    assert changed_tensors(net.state_dict(), still.state_dict())


def test_weight_decay_acts_on_matrices_and_kernels_only():
    net = micro_supernet()
    optimizer = PathSGD(net, 0.1, momentum=0.0, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        expected = before[name] * (0.95 if p.dim() > 1 else 1.0)
        assert torch.allclose(p, expected, rtol=1e-6), name
    assert {p.dim() > 1 for p in net.parameters()} == {True, False}


def test_the_head_has_a_rate_of_its_own_that_follows_the_trunks():
    net = micro_supernet()
    optimizer = PathSGD(net, 0.1, momentum=0.0, weight_decay=0.0, head_lr_multiplier=10.0)
    for lr in (0.1, 0.02):
        optimizer.set_lr(lr)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for name, p in net.named_parameters():
            rate = lr * 10 if name.startswith("head") else lr
            assert torch.allclose(p, before[name] - rate, atol=1e-6), name


def test_every_parameter_is_in_one_group():
    net = micro_supernet()
    params = [p for group in PathSGD(net, 0.1).param_groups for p in group["params"]]
    assert len(params) == len({id(p) for p in params}) == len(list(net.parameters()))


def test_momenta_come_back_exactly():
    nets = [micro_supernet(dropout=0.0), micro_supernet(dropout=0.0)]
    first = PathSGD(nets[0], 0.05)
    for step, arch in enumerate(["121", "102"]):
        first.zero_grad()
        _backward(nets[0], arch, step)
        first.step()
    nets[1].load_state_dict(nets[0].state_dict())
    second = PathSGD(nets[1], 0.05)
    second.load_momenta({name: value.clone() for name, value in first.momenta().items()})
    assert changed_tensors(first.momenta(), second.momenta()) == set()
    for net, optimizer in zip(nets, (first, second), strict=True):
        optimizer.zero_grad()
        _backward(net, "211", 5)
        optimizer.step()
    weights = [dict(net.named_parameters()) for net in nets]
    assert changed_tensors(*weights) == set()
    second.load_momenta({})
    assert second.momenta() == {}


def test_loaded_momenta_are_copies():
    net = micro_supernet()
    optimizer = PathSGD(net, 0.05)
    _backward(net, "121", 0)
    optimizer.step()
    given = {name: value.clone() for name, value in optimizer.momenta().items()}
    kept = copy.deepcopy(given)
    optimizer.load_momenta(given)
    optimizer.step()
    assert changed_tensors(given, kept) == set()
