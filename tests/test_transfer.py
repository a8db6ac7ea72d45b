from __future__ import annotations

import copy

import pytest
import torch

from fastshift.errors import CheckpointError, ConfigError
from fastshift.pretrain import pretrain
from fastshift.search import Search, SearchOptions, search, transfer
from fastshift.testing import (
    changed_tensors,
    micro_supernet,
    stop_at,
    synthetic_data,
    tiny_supernet,
    toy_supernet,
)

SMALL = {
    "generations": 1,
    "population": 4,
    "parents": 2,
    "mutation": 2,
    "crossover": 1,
    "shift_steps": 2,
    "shift_batch_size": 6,
    "shift_lr": 0.02,
    "top_k": 3,
    "head_warmup_steps": 2,
}


pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture(scope="module")
def data():
    """Three classes, where the supernets below were made for four."""
    return synthetic_data(num_classes=3, validation=(9,), calibration=(8,), seed=5)


def _clones(net):
    return {name: value.detach().clone() for name, value in net.tensors().items()}


def _is_trunk(name):
    return name.startswith(("stem", "blocks"))


def test_the_head_is_fresh_and_the_trunk_is_kept(data, monkeypatch):
    net = tiny_supernet()
    before = _clones(net)
    found = {}
    monkeypatch.setattr(Search, "run", lambda self, *_, **__: found.update(_clones(self.supernet)))
    transfer(net, data, seed=0, **SMALL)
    assert net.space.num_classes == 3
    assert net.head.classifier.weight.shape == (3, 12)
    for name, value in before.items():
        if not name.startswith("head.classifier"):
            assert torch.equal(found[name], value), name
    assert (found["head.classifier.bias"] == 0).all()
    assert 0.002 < float(found["head.classifier.weight"].std()) < 0.05
    assert net(data.validation[0][0], "0000").shape == (9, 3)


def test_equal_seeds_draw_equal_heads(data):
    heads = []
    for seed in (0, 0, 1):
        net = micro_supernet()
        net.reset_head(3, seed=seed)
        heads.append(net.head[-1].weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_the_warm_up_trains_only_the_head_before_the_first_score(data):
    net = micro_supernet()
    net.reset_head(3, seed=0)
    before = _clones(net)
    options = SearchOptions(**{**SMALL, "head_warmup_steps": 3})
    found = Search(net, data, options, fresh_head=True)
    assert found.run(stop_at(3)).stopped == "interrupted"
    moved = {n for n in changed_tensors(before, net.tensors()) if not n.startswith("ema.")}
    assert moved == {"head.2.weight", "head.2.bias"}
    assert net.version == 3
    assert found.counts["scored"] == 0
    result = found.run()
    assert any(_is_trunk(name) for name in changed_tensors(before, net.tensors()))
    assert result.budget["updates"] == 3 + 4
    assert result.budget["train_images"] == 7 * 6
    assert result.budget["path_image_pairs"] == 3 * 6 + 4 * 6 * 4
    assert result.generations[0]["weights_version"] == 3


@pytest.mark.parametrize(
    ("shift", "steps"),
    [("accumulate", 200), ("every:2", 200), ("uniform", 200), ("immediate", 0)],
)
def test_the_default_warm_up_is_the_modes_own(shift, steps, data):
    options = SearchOptions(**{**SMALL, "shift": shift, "head_warmup_steps": None})
    assert Search(micro_supernet(3), data, options, fresh_head=True).warmup_steps == steps
    assert Search(micro_supernet(3), data, options).warmup_steps == 0


def test_a_fresh_head_that_nothing_would_train_is_refused(data):
    options = {**SMALL, "shift": "none", "head_warmup_steps": None}
    with pytest.raises(ConfigError, match="head_warmup_steps"):
        Search(micro_supernet(3), data, SearchOptions(**options), fresh_head=True)
    warmed = SearchOptions(**{**options, "head_warmup_steps": 2})
    assert Search(micro_supernet(3), data, warmed, fresh_head=True).warmup_steps == 2


def test_everything_trains_after_the_warm_up(data):
    net = tiny_supernet()
    before = _clones(net)
    transfer(net, data, seed=0, **{**SMALL, "population": 12, "mutation": 6, "crossover": 4})
    moved = changed_tensors(before, net.tensors())
    assert all(p.requires_grad for p in net.parameters())
    assert "stem.0.weight" in moved
    for block in range(4):
        assert any(name.startswith(f"blocks.{block}") for name in moved)


def test_a_frozen_trunk_trains_only_the_head_in_the_first_generations(data):
    net = micro_supernet()
    net.reset_head(3, seed=0)
    before = _clones(net)
    options = SearchOptions(
        **{**SMALL, "generations": 2, "frozen_trunk_generations": 2, "head_warmup_steps": 0}
    )
    found = Search(net, data, options, fresh_head=True)
    assert found.run(stop_at(6)).stopped == "interrupted"  # two generations of 2 updates and an end
    moved = {n for n in changed_tensors(before, net.tensors()) if not n.startswith("ema.")}
    assert moved == {"head.2.weight", "head.2.bias"}
    assert all(p.requires_grad for p in net.parameters())
    found.run()
    assert "stem.0.weight" in changed_tensors(before, net.tensors())


def test_a_stop_in_a_frozen_generation_changes_nothing(data, tmp_path):
    options = {**SMALL, "generations": 2, "frozen_trunk_generations": 2}
    whole = micro_supernet()
    transfer(whole, data, seed=0, **options)
    net = micro_supernet()
    net.reset_head(3, seed=0)
    for call in (4, 3, None):
        part = search(
            net,
            data,
            seed=0,
            fresh_head=True,
            out=tmp_path,
            resume=True,
            stop=(lambda: False) if call is None else stop_at(call),
            **options,
        )
        assert all(p.requires_grad for p in net.parameters())
        assert (part.stopped is None) == (call is None)
    assert changed_tensors(whole.tensors(), net.tensors()) == set()


def test_a_search_object_stopped_in_a_frozen_generation_stays_frozen(data):
    options = SearchOptions(**{**SMALL, "generations": 2, "frozen_trunk_generations": 2})
    nets = [micro_supernet(3), micro_supernet(3)]
    Search(nets[0], data, options, fresh_head=True).run()
    found = Search(nets[1], data, options, fresh_head=True)
    for call in (3, 1, 2):
        found.run(stop_at(call))
    found.run()
    assert changed_tensors(nets[0].tensors(), nets[1].tensors()) == set()


def test_the_head_can_have_a_rate_of_its_own(data):
    nets = {}
    for multiplier in (1.0, 10.0):
        net = micro_supernet(3, dropout=0.0)
        before = _clones(net)
        options = {**SMALL, "generations": 0, "shift_steps": 1, "head_warmup_steps": 0}
        search(net, data, head_lr_multiplier=multiplier, shift_weight_decay=0.0, **options)
        nets[multiplier] = {name: p.detach() - before[name] for name, p in net.named_parameters()}
    for name, step in nets[1.0].items():
        factor = 10.0 if name.startswith("head") else 1.0
        assert torch.allclose(nets[10.0][name], factor * step, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("shift", ["accumulate", "immediate"])
def test_a_transfer_stopped_anywhere_and_resumed_equals_the_unbroken_one(shift, data, tmp_path):
    options = {**SMALL, "population": 2, "mutation": 1, "crossover": 1, "shift": shift}
    whole = micro_supernet()
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        return False

    reference = transfer(whole, data, seed=0, out=tmp_path / "whole", stop=count, **options)
    assert calls == (8 if shift == "accumulate" else 12)
    for call in range(1, calls + 1):
        out = tmp_path / str(call)
        transfer(micro_supernet(), data, seed=0, out=out, stop=stop_at(call), **options)
        net = micro_supernet(seed=7)
        result = transfer(net, data, seed=0, out=out, resume=True, **options)
        assert changed_tensors(whole.tensors(), net.tensors()) == set()
        assert result.top == reference.top
        assert result.budget == reference.budget


def test_a_transfer_is_not_resumed_as_a_search_of_the_old_classes(data, tmp_path):
    transfer(micro_supernet(), data, seed=0, out=tmp_path, stop=stop_at(1), **SMALL)
    four = synthetic_data(validation=(9,), calibration=(8,))
    with pytest.raises(CheckpointError, match="another run"):
        search(micro_supernet(), four, seed=0, out=tmp_path, resume=True, **SMALL)


def test_a_transfer_learns_the_new_classes():
    old = synthetic_data(in_channels=1, validation=(60,), calibration=(8,), noise=3.0, seed=1)
    new = copy.copy(old)
    order = torch.tensor([2, 0, 3, 1])  # the same patterns under other names
    new.train = copy.copy(old.train)
    batch = old.train.batch
    new.train.batch = lambda *args: (lambda x, y: (x, order[y]))(*batch(*args))
    new.validation = [(x, order[y]) for x, y in old.validation]
    net = toy_supernet((0, 1, 2))
    pretrain(net, old, steps=60, batch_size=32, lr=0.1)
    options = {**SMALL, "shift_batch_size": 32, "shift_lr": 0.01, "head_warmup_steps": 30}
    result = transfer(net, new, seed=0, score_by="loss", **options)
    assert result.best.error < 0.5  # chance is 0.75
