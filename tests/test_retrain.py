"""One architecture trained from scratch: what it is made of, and what it depends on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastshift import data as data_module
from fastshift.errors import ArchError, CheckpointError, ConfigError, DataError, SpaceError
from fastshift.ops import Head, Unit, conv, identity, inverted_residual, shuffle_unit
from fastshift.retrain import RetrainOptions, retrain, single_path, top1_error
from fastshift.single_path import check_resets, fresh_path
from fastshift.space import SearchSpace
from fastshift.supernet import ChainSupernet, Supernet
from fastshift.testing import assert_untouched, randomise, snapshot
from fastshift.weights import load_supernet, save_supernet


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data():
    return data_module.load("digits", seed=0)


@pytest.fixture(scope="module")
def space():
    ops = [
        identity(8),
        conv(8, 8, 3, 1),
        inverted_residual(8, 8, 1, 2, 3),
        shuffle_unit(8, 8, 1, 3),
    ]
    wider = [conv(8, 16, 3, 2)]
    return SearchSpace(
        "small",
        stem=[Unit("dense", 1, 8, kernel=3)],
        blocks=[ops, wider, [identity(16), conv(16, 16, 3, 1)]],
        head=Head(16, (), 10, dropout=0.1),
        in_channels=1,
        image_size=8,
        affine=False,
    )


QUICK = {"epochs": 2, "batch_size": 64, "lr": 0.1}


def equal(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_network_is_the_architectures_alone_with_affine_batch_norms(space, data):
    alone = single_path(space, "201")
    assert alone.num_choices.tolist() == [1, 1, 1]
    assert alone.flops(["000"]).tolist() == space.flops(["201"]).tolist()
    norms = [m for m in Supernet(alone).modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(norm.affine for norm in norms)
    assert not any(m.affine for m in Supernet(space).modules() if isinstance(m, nn.BatchNorm2d))


def test_it_learns(space, data):
    trained = retrain(space, "101", data, seed=0, epochs=5, batch_size=64, lr=0.3)
    assert trained.test_error < 0.5
    assert trained.test_error == top1_error(trained.net, data.test)
    assert not trained.net.training


def test_it_is_a_function_of_its_arguments_alone(space, data):
    torch.manual_seed(1)
    first = retrain(space, "101", data, seed=3, **QUICK)
    torch.manual_seed(2)
    again = retrain(space, np.array([1, 0, 1], np.uint8), data, seed=3, **QUICK)
    other = retrain(space, "101", data, seed=4, **QUICK)
    assert equal(first.net, again.net)
    assert first.test_error == again.test_error
    assert not equal(first.net, other.net)


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_a_callers_mode_changes_nothing(mode, space, data):
    plain = retrain(space, "101", data, seed=3, **QUICK)
    with mode():
        found = retrain(space, "101", data, seed=3, **QUICK)
    assert equal(found.net, plain.net)
    assert found.test_error == plain.test_error
    assert all(parameter.requires_grad for parameter in found.net.parameters())


def test_it_draws_nothing_from_the_global_generator(space, data):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    retrain(space, "101", data, **QUICK)
    assert torch.equal(torch.rand(3), expected)


def test_interrupted_and_resumed_it_ends_the_same(space, data, tmp_path):
    whole = retrain(space, "101", data, seed=1, **QUICK)
    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        return steps > 7

    cut = retrain(space, "101", data, seed=1, out=tmp_path, stop=stop, **QUICK)
    assert cut.stopped == "interrupted"
    assert cut.test_error is None
    rest = retrain(space, "101", data, seed=1, out=tmp_path, resume=True, **QUICK)
    assert rest.steps == whole.steps
    assert equal(rest.net, whole.net)
    with pytest.raises(CheckpointError, match="holds a run already"):
        retrain(space, "101", data, seed=1, out=tmp_path, **QUICK)
    with pytest.raises(CheckpointError, match="another run"):
        retrain(space, "001", data, seed=1, out=tmp_path, resume=True, **QUICK)


def test_the_trained_path_is_saved_and_loaded_as_a_supernet_of_one(space, data, tmp_path):
    trained = retrain(space, "101", data, **QUICK)
    save_supernet(trained.path, tmp_path, {"arch": "101"})
    loaded, meta = load_supernet(tmp_path)
    assert meta["arch"] == "101"
    assert equal(loaded.subnet("000"), trained.net)


class Scale(nn.Module):
    """Has a weight, and nothing that draws it anew."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.weight


class Gate(Scale):
    """Draws its weight itself."""

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, 0.5, 1.5)


class Lazy(Scale):
    """Says that it draws its weight, and does not."""

    def reset_parameters(self) -> None:
        pass


class Broken(Scale):
    def reset_parameters(self) -> None:
        raise AttributeError("gain")


def chain(*more: nn.Module) -> ChainSupernet:
    def body() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), Gate())

    return ChainSupernet(
        nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)),
        [[nn.Identity(), body(), *more], [body(), nn.Identity()]],
        nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 10)),
        input_shape=(1, 8, 8),
    )


def test_a_path_of_modules_starts_anew_from_the_seed_alone(data):
    source = randomise(chain(), 1)
    before = snapshot(source)
    first = retrain(source, "10", data, seed=3, **QUICK)
    again = retrain(randomise(chain(), 2), "10", data, seed=3, **QUICK)
    other = retrain(source, "10", data, seed=4, **QUICK)
    assert equal(first.net, again.net)
    assert not equal(first.net, other.net)
    assert_untouched(source, before)
    assert first.path.space.num_choices.tolist() == [1, 1]
    assert first.path.space.flops(["00"]).tolist() == source.space.flops(["10"]).tolist()
    assert first.path.space.params(["00"]).tolist() == source.space.params(["10"]).tolist()
    assert first.net.state_dict().keys() == source.subnet("10").state_dict().keys()


def test_a_path_of_modules_learns_and_comes_back_from_its_file(data, tmp_path):
    source = chain()
    trained = retrain(source, "11", data, epochs=5, batch_size=64, lr=0.2)
    assert trained.test_error < 0.5
    save_supernet(trained.path, tmp_path, {"arch": "11"})
    loaded, _ = load_supernet(tmp_path, into=fresh_path(chain(), "11", seed=9))
    assert equal(loaded.subnet("00"), trained.net)
    with pytest.raises(CheckpointError, match="another space, 'chain/11'"):
        load_supernet(tmp_path, into=fresh_path(chain(), "10", seed=9))


def test_a_described_supernet_stands_for_its_space(space, data):
    from_space = retrain(space, "101", data, seed=1, **QUICK)
    from_supernet = retrain(randomise(Supernet(space)), "101", data, seed=1, **QUICK)
    assert equal(from_space.net, from_supernet.net)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Scale(), r"blocks\.0: reset_parameters of its Scale is missing"),
        (nn.Sequential(nn.ReLU(), Scale()), r"blocks\.0\.1: reset_parameters of its Scale is"),
        (Lazy(), r"blocks\.0: reset_parameters of its Lazy leaves weight as it was"),
        (Broken(), r"blocks\.0: reset_parameters of its Broken fails with AttributeError"),
    ],
    ids=["missing", "nested", "lazy", "broken"],
)
def test_a_module_that_cannot_start_anew_is_refused_by_name(module, says, data):
    source = chain(module)
    with pytest.raises(SpaceError, match=says):
        retrain(source, "20", data, **QUICK)
    with pytest.raises(SpaceError, match=says.replace(r"\.0", r"\.0\.2", 1)):
        check_resets(source)
    assert retrain(source, "10", data, epochs=1, batch_size=128).test_error <= 1.0


def test_weights_that_a_parent_draws_need_nothing_of_their_own(data):
    class Parent(nn.Sequential):
        def reset_parameters(self) -> None:
            nn.init.constant_(self[0].weight, 2.0)

    path = fresh_path(chain(Parent(Scale())), "20", seed=0)
    assert path.blocks[0][0][0].weight.item() == 2.0


def test_steps_follow_from_epochs_and_the_training_part():
    options = RetrainOptions(epochs=3, batch_size=50, warmup_epochs=1).for_images(1000)
    assert (options.steps, options.warmup_steps, options.schedule) == (60, 20, "cosine")
    assert options.lr_at(20) == options.peak_lr
    assert RetrainOptions(epochs=1, batch_size=128).for_images(20).steps == 1


def test_what_cannot_be_retrained_is_refused(space, data):
    with pytest.raises(ArchError, match="'12'"):
        retrain(space, "12", data, **QUICK)
    with pytest.raises(ConfigError, match="epochs: 0"):
        retrain(space, "101", data, epochs=0)
    with pytest.raises(ConfigError, match="epoch: unknown option"):
        retrain(space, "101", data, epoch=1)
    with pytest.raises(ConfigError, match="schedule: 'step'"):
        RetrainOptions(schedule="step")
    with pytest.raises(SpaceError, match="no description"):
        retrain(chain().space, "00", data, **QUICK)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    untested = data_module.from_arrays(images, np.arange(40) % 10)
    with pytest.raises(DataError, match="no test set"):
        retrain(space, "101", untested, **QUICK)


def test_an_error_is_a_share_of_the_images_whatever_the_batches(space, data):
    net = Supernet(space).subnet("101", calibration=data.calibration)
    images = torch.cat([x for x, _ in data.test])
    labels = torch.cat([y for _, y in data.test])
    whole = top1_error(net, [(images, labels)])
    parts = top1_error(net, list(zip(images.split(7), labels.split(7), strict=True)))
    assert whole == parts
    with pytest.raises(ValueError, match="none to test on"):
        top1_error(net, [])
