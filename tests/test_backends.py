"""What computes a layer: named in the environment, refused where it cannot run."""

from __future__ import annotations

import pytest
import torch

from fastshift import backends
from fastshift.errors import ConfigError
from fastshift.static_supernet import wanted_steps


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("FASTSHIFT_BACKEND", raising=False)
    monkeypatch.delenv("FASTSHIFT_STEPS", raising=False)
    backends._lacks_triton.cache_clear()
    yield
    backends._lacks_triton.cache_clear()


@pytest.mark.parametrize(
    ("found", "lacking"),
    [
        ("3.5.1", "triton is 3.5.1; expected 3.6 or newer"),
        ("2.9", "triton is 2.9; expected 3.6 or newer"),
        ("3.6.0", None),
        ("3.10.0+git1", None),
        ("4.0", None),
    ],
)
def test_an_old_triton_is_named_with_what_is_expected(found, lacking, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: name)
    monkeypatch.setattr(backends, "version", lambda name: found)
    assert backends._lacks_triton() == lacking
    assert backends.cuda_backend() == ("reference" if lacking else "triton")
    monkeypatch.setenv("FASTSHIFT_BACKEND", "triton")
    if lacking is None:
        assert backends.cuda_backend() == "triton"
        return
    for ask in (backends.cuda_backend, backends.backend):
        with pytest.raises(ConfigError, match=f"'triton' cannot run: {lacking}"):
            ask()


def test_a_device_that_is_too_old_is_named_and_the_reference_runs_there(monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = {None: (8, 0), torch.device("cuda:0"): (7, 5), torch.device("cuda:1"): (10, 3)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", found.get)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    old, new = list(found)[1:]
    lacking = "T4 has compute capability 7.5; expected 8.0 or newer"
    assert backends.why_no_triton(old) == lacking
    assert wanted_steps(old) == ("modules", lacking)
    assert [backends.cuda_backend(device) for device in (old, new, None)] == [
        "reference",
        "triton",
        "triton",
    ]
    assert wanted_steps(new)[0] == "static"
    monkeypatch.setenv("FASTSHIFT_BACKEND", "triton")
    assert backends.cuda_backend(new) == "triton"
    with pytest.raises(ConfigError, match=f"'triton' cannot run: {lacking}"):
        backends.cuda_backend(old)


def test_a_cuda_device_takes_what_is_asked_for(monkeypatch):
    for name, wanted in (("reference", "reference"), ("cpu", "reference")):
        monkeypatch.setenv("FASTSHIFT_BACKEND", name)
        assert backends.cuda_backend() == wanted
    monkeypatch.setenv("FASTSHIFT_BACKEND", "cuda")
    with pytest.raises(ConfigError, match="'cuda'; expected one of"):
        backends.cuda_backend()
