from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastshift import spaces
from fastshift.batch_norm import start_ema
from fastshift.errors import ArchError, CheckpointError, DataError, SpaceError
from fastshift.evaluator import Evaluator
from fastshift.supernet import Supernet
from fastshift.testing import (
    chain_supernet,
    changed_tensors,
    random_archs,
    synthetic_data,
    tiny_space,
    tiny_supernet,
)

MAKERS = {"described": tiny_supernet, "chain": chain_supernet}


@pytest.fixture(scope="module")
def data():
    return synthetic_data(validation=(10, 6), calibration=(8, 5))


# Names and shapes


def test_weights_are_named_by_block_choice_and_unit():
    keys = tiny_supernet().state_dict().keys()
    assert {
        "stem.0.weight",
        "blocks.0.1.0.weight",
        "blocks.0.1.2.norm.running_mean",
        "blocks.1.3.shortcut.0.weight",
        "blocks.3.1.0.norm.bias",
        "head.features.0.weight",
        "head.classifier.weight",
    } <= set(keys)
    assert not any(key.startswith("blocks.0.0") for key in keys)  # an identity has nothing


@pytest.mark.parametrize(
    "space",
    [
        tiny_space(),
        tiny_space(affine=False),
        spaces.digits(),
        spaces.nasbench_macro(width=0.25),
        spaces.shufflenet_v2(image_size=32, num_classes=10, width=0.25),
    ],
    ids=lambda space: f"{space.name}-{space.affine}",
)
def test_a_built_network_has_the_parameters_and_multiply_adds_of_its_description(space):
    net = Supernet(space)
    images = torch.zeros(1, space.in_channels, space.image_size, space.image_size)
    for arch in random_archs(space, 3, seed=1):
        subnet = net.subnet(arch)
        assert sum(p.numel() for p in subnet.parameters()) == int(space.params(arch)[0])
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            logits = subnet(images)
        assert counter.get_total_flops() == 2 * int(space.flops(arch)[0])
        assert logits.shape == (1, space.num_classes)


@pytest.mark.parametrize("arch", ["3111", (3, 1, 1, 1), torch.tensor([3, 1, 1, 1]).numpy()])
def test_forward_takes_any_form_of_an_architecture(arch, data):
    net = tiny_supernet().eval()
    images = data.validation[0][0]
    with torch.no_grad():
        assert torch.equal(net(images, arch), net.subnet("3111")(images))


@pytest.mark.parametrize("arch", ["4000", "000", (0, 0, 0, 3), ["0000", "0000"]])
def test_an_architecture_that_is_not_in_the_space_is_refused(arch, data):
    net = tiny_supernet()
    with pytest.raises(ArchError):
        net(data.validation[0][0], arch)
    with pytest.raises(ArchError):
        net.subnet(arch)


def test_half_of_the_channels_pass_a_shuffle_unit_untouched():
    net = tiny_supernet().eval()
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    y = net.blocks[0][3](x)
    assert torch.equal(y[:, :4], x[:, ::2])
    other = x.clone()
    other[:, ::2] += 1
    assert torch.equal(net.blocks[0][3](other)[:, 4:], y[:, 4:])


def test_a_residual_op_adds_its_input():
    net = tiny_supernet().eval()
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    op = copy.deepcopy(net.blocks[0][1])
    op.get_submodule("2").norm.weight.data.zero_()
    op.get_submodule("2").norm.bias.data.zero_()
    assert torch.equal(op(x), x)


# Stand-alone networks


@pytest.mark.parametrize("kind", MAKERS)
def test_a_subnet_is_plain_and_shares_nothing_with_its_supernet(kind, data):
    net = MAKERS[kind]()
    net.train()
    before = {name: value.clone() for name, value in net.tensors().items()}
    subnet = net.subnet(random_archs(net.space, 1)[0], calibration=data.calibration)
    assert not isinstance(subnet, type(net))
    assert [name for name, _ in subnet.named_children()] == ["stem", "blocks", "head"]
    norms = [m for m in subnet.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert {type(norm) for norm in norms} == {nn.BatchNorm2d}
    assert not any(module.training for module in subnet.modules())
    assert net.training
    own = {value.untyped_storage().data_ptr() for value in subnet.state_dict().values()}
    assert not own & {value.untyped_storage().data_ptr() for value in net.tensors().values()}
    with torch.no_grad():
        for value in subnet.parameters():
            value.add_(1)
    subnet.train()(data.validation[0][0])
    assert changed_tensors(before, net.tensors()) == set()


@pytest.mark.parametrize("strategy", ["shared", "sequential"])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_error_of_a_subnet_is_its_score(kind, strategy, data):
    net = MAKERS[kind]()
    archs = random_archs(net.space, 3, seed=5)
    score = Evaluator(net, data.validation, calibration=data.calibration, strategy=strategy)
    for arch, error in zip(archs, score(archs), strict=True):
        subnet = net.subnet(arch, calibration=data.calibration)
        wrong = total = 0
        with torch.no_grad():
            for images, labels in data.validation:
                wrong += int((subnet(images).argmax(1) != labels).sum())
                total += len(labels)
        assert float(error) == pytest.approx(wrong / total, abs=1e-7)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_subnet_has_the_running_or_the_shifted_statistics(kind, data):
    net = MAKERS[kind]().eval()
    arch = random_archs(net.space, 1, seed=3)[0]
    images = data.validation[0][0]
    with torch.no_grad():
        assert torch.equal(net.subnet(arch)(images), net(images, arch))
    start_ema(net)
    for value in net.ema.values():
        value.mul_(1.5).add_(0.1)
    for name, value in net.subnet(arch, statistics="ema").state_dict().items():
        source = net._source_key(name, arch)
        if "running" in name:
            assert torch.equal(value, net.ema[source])
        else:
            assert torch.equal(value, net.state_dict()[source])


def test_statistics_that_are_not_there_are_refused():
    net = tiny_supernet()
    with pytest.raises(ValueError, match="ema"):
        net.subnet("0000", statistics="ema")
    with pytest.raises(ValueError, match="statistics: 'latest'"):
        net.subnet("0000", statistics="latest")
    with pytest.raises(ValueError, match="calibration"):
        net.subnet("0000", calibration=[])


# A fresh head


def test_a_fresh_head_replaces_the_classifier_alone(data):
    net = tiny_supernet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.reset_head(7, seed=0)
    assert net.head.classifier.weight.shape == (7, 12)
    assert (net.head.classifier.bias == 0).all()
    classifier = {"head.classifier.weight", "head.classifier.bias"}
    assert changed_tensors(before, net.state_dict()) == classifier
    assert net.space.num_classes == 7
    arch = net.space.as_archs(["1111"])
    total = sum(p.numel() for p in net.subnet(arch[0]).parameters())
    assert total == int(net.space.params(arch)[0])
    Evaluator(net, data.validation, calibration=data.calibration)(arch)


def test_a_fresh_head_keeps_its_type_and_its_want_of_a_bias():
    net = Supernet(spaces.shufflenet_v2(image_size=32, num_classes=4, width=0.25)).double()
    net.reset_head(3)
    assert net.head.classifier.bias is None
    assert net.head.classifier.weight.dtype == torch.float64


def test_a_chains_head_is_found_wherever_its_last_linear_layer_is():
    net = chain_supernet()
    flops, params = net.space.fixed_flops, net.space.fixed_params
    net.reset_head(9, seed=0)
    assert net.head[-1].out_features == 9
    assert net.space.num_classes == 9
    assert net.space.fixed_flops - flops == 6 * 5
    assert net.space.fixed_params - params == 7 * 5
    net.head = nn.Linear(6, 4)
    net.reset_head(2, seed=0)
    assert net.head.out_features == 2
    net.head = nn.AdaptiveAvgPool2d(1)
    with pytest.raises(SpaceError, match=r"no nn\.Linear"):
        net.reset_head(2)


# Weights in and out


def test_all_that_training_changes_comes_back_exactly():
    net = tiny_supernet()
    start_ema(net)
    for value in net.ema.values():
        value.add_(1)
    saved = {name: value.clone() for name, value in net.tensors().items()}
    other = tiny_supernet(seed=8)
    other.load_tensors(saved, 42)
    assert changed_tensors(saved, other.tensors()) == set()
    assert other.version == 42
    other.ema["stem.0.norm.running_mean"].zero_()
    assert (saved["ema.stem.0.norm.running_mean"] != 0).any()
    other.load_tensors({n: v for n, v in saved.items() if not n.startswith("ema.")}, 1)
    assert other.ema == {}


def test_weights_that_do_not_fit_are_refused_by_name():
    net = tiny_supernet()
    saved = net.tensors()
    before = {name: value.clone() for name, value in saved.items()}
    missing = {name: value for name, value in saved.items() if name != "blocks.0.2.0.weight"}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.2\.0\.weight is missing"):
        net.load_tensors(missing, 0)
    with pytest.raises(CheckpointError, match="extra is unknown"):
        net.load_tensors({**saved, "extra": torch.zeros(1)}, 0)
    wrong = {**saved, "head.classifier.bias": torch.zeros(5)}
    with pytest.raises(CheckpointError, match=r"head\.classifier\.bias has shape \(5,\)"):
        net.load_tensors(wrong, 0)
    assert changed_tensors(before, net.tensors()) == set()


def test_trunk_and_head_are_all_there_is():
    net = tiny_supernet()
    trunk = {id(p) for p in net.trunk_parameters()}
    head = {id(p) for p in net.head.parameters()}
    assert not trunk & head
    assert trunk | head == {id(p) for p in net.parameters()}


def test_a_space_without_a_description_builds_no_supernet():
    with pytest.raises(SpaceError, match="no description"):
        Supernet(chain_supernet().space)


def test_calibration_on_one_image_of_one_pixel_is_refused_in_our_words():
    net = Supernet(spaces.nasbench_macro(image_size=8, width=0.25))  # 1x1 maps in the last stage
    images = torch.rand(3, 3, 8, 8)
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(DataError, match=r"^batch of 1 image: .* expected batches of at least 2"):
        net.subnet("1" * 8, calibration=[(images[:2], labels[:2]), (images[2:], labels[2:])])
    net.subnet("1" * 8, calibration=[(images, labels)])
    wider = Supernet(spaces.nasbench_macro(image_size=16, width=0.25))
    wider.subnet("1" * 8, calibration=[(torch.rand(1, 3, 16, 16), labels[:1])])
