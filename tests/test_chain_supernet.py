from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fastshift.errors import SpaceError
from fastshift.evaluator import Evaluator
from fastshift.pretrain import pretrain
from fastshift.search import search
from fastshift.supernet import ChainSupernet
from fastshift.testing import (
    FLOAT64_TOLERANCE,
    Residual,
    chain_supernet,
    changed_tensors,
    global_error,
    path_gradients,
    randomise,
    synthetic_data,
)


def _stem():
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())


def _head(classes=4):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


@pytest.fixture(scope="module")
def data():
    return synthetic_data(validation=(10, 6), calibration=(8, 5))


class _Flip(nn.Module):
    """Returns a view of its input."""

    def forward(self, x):
        return x.transpose(2, 3)


class _Same(nn.Module):
    """Returns its input itself, and is no `nn.Identity`."""

    def forward(self, x):
        return x


def test_the_example_of_the_interface_scores_without_an_input_shape(data):
    blocks = [[nn.Conv2d(4, 4, 1), nn.Identity()], [nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 1, 1)]]
    net = ChainSupernet(_stem(), blocks, _head())
    score = Evaluator(net, data.validation, calibration=data.validation)
    errors = score([(0, 0), (1, 1), (0, 1)])
    assert errors.shape == (3,)
    assert errors.dtype == np.float32
    assert net.space.num_classes == 4
    assert (net.space.flops_table == 0).all()


def test_choices_costs_and_identities_are_read_off_the_modules():
    net = chain_supernet()
    space = net.space
    assert space.num_choices.tolist() == [1, 4, 3, 2, 3]
    assert space.identities[1].tolist() == [True, False, False, False]
    assert space.identities[3].tolist()[:2] == [True, False]
    size = 4 * 4  # the stem halves 8 x 8
    assert space.flops_table[0, 0] == 6 * 6 * 9 * size
    assert space.flops_table[1].tolist() == [0, 6 * 6 * 9 * size, 0, 6 * 2 + 2 * 6]
    assert space.flops_table[4, :3].tolist() == [8 * 6 * size, 8 * 6 * size, 8 * 6 // 2 * 9 * size]
    assert space.params_table[1].tolist() == [0, 6 * 6 * 9 + 6 + 12, 0, 14 + 18]
    assert space.fixed_flops == 3 * 6 * 9 * size + 6 * 4
    for arch in ("00000", "03211"):
        subnet = net.subnet(arch)
        assert sum(p.numel() for p in subnet.parameters()) == int(space.params(arch)[0])


def test_measuring_costs_leaves_modules_and_statistics_alone():
    parts = _stem(), [[Residual(4), nn.Identity()]], _head()
    parts[1][0][0].eval()
    parts[0].train()
    tensors = {n: v.clone() for n, v in nn.ModuleList([*parts[1][0]]).state_dict().items()}
    net = ChainSupernet(*parts, input_shape=(3, 8, 8))
    assert not net.blocks[0][0].training
    assert net.stem.training
    assert changed_tensors(tensors, net.blocks[0].state_dict()) == set()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], "blocks"),
        ([[nn.Identity()], []], "blocks"),
        ([[nn.Conv2d(5, 4, 1)]], r"blocks\.0\.0: cannot take"),
        ([[nn.Identity(), nn.Conv2d(4, 5, 1)]], r"blocks\.0: candidate ops give different shapes"),
        ([[nn.Identity()], [nn.MaxPool2d(2), nn.Identity()]], r"blocks\.1: candidate ops"),
        ([[nn.Conv2d(4, 5, 1)]], "head: cannot take"),
    ],
    ids=["none", "empty", "input", "channels", "size", "head"],
)
def test_a_chain_that_does_not_fit_together_is_refused(blocks, message):
    with pytest.raises(SpaceError, match=message):
        ChainSupernet(_stem(), blocks, _head(), input_shape=(3, 8, 8))


def test_one_identity_may_stand_in_many_places(data):
    same = nn.Identity()
    net = ChainSupernet(_stem(), [[same, Residual(4)], [same, Residual(4)]], _head())
    score = Evaluator(net, data.validation, calibration=data.calibration)
    plain = Evaluator(net, data.validation, calibration=data.calibration, strategy="sequential")
    archs = list(itertools.product(range(2), range(2)))
    np.testing.assert_allclose(
        score.evaluate(archs).losses, plain.evaluate(archs).losses, rtol=1e-5
    )


def test_a_module_with_weights_in_two_places_is_refused():
    shared = Residual(4)
    with pytest.raises(SpaceError, match=r"blocks\.1\.1"):
        ChainSupernet(_stem(), [[shared, nn.Identity()], [nn.Identity(), shared]], _head())
    norm = nn.BatchNorm2d(4)
    ops = [nn.Sequential(nn.Conv2d(4, 4, 1), norm), nn.Sequential(nn.Conv2d(4, 4, 3), norm)]
    with pytest.raises(SpaceError, match=r"blocks\.0\.1\.1"):
        ChainSupernet(_stem(), [ops], _head())


def test_views_and_aliases_of_a_row_score_and_train_as_one_at_a_time(data):
    blocks = [[_Flip(), _Same(), Residual(4)], [_Same(), Residual(4)], [_Flip(), Residual(4)]]
    net = randomise(ChainSupernet(_stem(), blocks, _head())).double()
    archs = np.array(list(itertools.product(range(3), range(2), range(2))), np.uint8)
    shared, plain = (
        Evaluator(net, data.validation, calibration=data.calibration, strategy=strategy)
        .evaluate(archs)
        .losses
        for strategy in ("shared", "sequential")
    )
    assert global_error([shared], [plain]) < FLOAT64_TOLERANCE
    images, labels = data.train.batch(0, 6)
    from fastshift.batch_norm import BatchNorms, MovingAverages
    from fastshift.steps import train_step
    from fastshift.trie import Plan

    exact, _ = path_gradients(net, archs, images.double(), labels)
    net.train()
    norms = BatchNorms(net)
    for size in (1, 5):
        net.zero_grad()
        train_step(
            net,
            norms,
            Plan(archs, size),
            images.double(),
            labels,
            MovingAverages(norms),
            key=(0, 0),
        )
        found = [p.grad for p in net.parameters()]
        assert global_error(found, exact.values()) < FLOAT64_TOLERANCE


def test_many_choices_are_written_with_dots(data):
    blocks = [[nn.Conv2d(4, 4, 1) for _ in range(12)], [nn.Identity(), Residual(4)]]
    net = ChainSupernet(_stem(), blocks, _head())
    score = Evaluator(net, data.validation, calibration=data.calibration)
    assert (score(["11.1", "0.0"]) == score([(11, 1), (0, 0)])).all()


def test_a_chain_is_pre_trained_and_searched_like_any_supernet(data, tmp_path):
    net = chain_supernet()
    pretrain(net, data, steps=3, batch_size=6, lr=0.05, sampler="fair")
    assert net.version == 3
    result = search(
        net,
        data,
        {"flops": "90%"},
        out=tmp_path,
        generations=1,
        population=4,
        parents=2,
        shift_steps=1,
        shift_batch_size=6,
    )
    assert result.best.weights_version == 5
    assert result.best.flops <= 0.9 * net.space.largest("flops")
    assert (tmp_path / "supernet.safetensors").exists()


@pytest.mark.parametrize("steps", ["modules", "static"])
def test_one_dimensional_data_can_be_searched_too(steps, monkeypatch):
    """Nothing in a plan knows about images: rows of any shape do."""
    monkeypatch.setenv("FASTSHIFT_STEPS", steps)
    blocks = [[nn.Identity(), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())]] * 1
    blocks += [[nn.Linear(8, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8))]]
    net = randomise(ChainSupernet(nn.Linear(5, 8), blocks, nn.Linear(8, 3)))
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(9, 5, generator=generator), torch.randint(3, (9,), generator=generator))
        for _ in range(2)
    ]
    archs = list(itertools.product(range(2), range(2)))
    for policy in ("recalibrate", "batch", "running"):
        shared, plain = (
            Evaluator(net, batches, calibration=batches, batch_norm=policy, strategy=strategy)
            .evaluate(archs)
            .losses
            for strategy in ("shared", "sequential")
        )
        np.testing.assert_allclose(shared, plain, rtol=1e-5)
