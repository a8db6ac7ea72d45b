"""The README: its first screen, and its examples, which run as they stand."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
FIRST_SCREEN = README[: README.index("\n## ")]


class Trial:
    def __init__(self, number: int) -> None:
        self.params: dict[str, int] = {}
        self.generator = torch.Generator().manual_seed(number)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.params[name] = int(torch.randint(low, high + 1, (), generator=self.generator))
        return self.params[name]


class Study:
    best_value = float("inf")
    best_params: dict[str, int] | None = None
    asked = 0

    def ask(self) -> Trial:
        self.asked += 1
        return Trial(self.asked)

    def tell(self, trial: Trial, value: float) -> None:
        if value < self.best_value:
            self.best_value, self.best_params = value, trial.params


@pytest.fixture
def optuna(monkeypatch):
    """Optuna's ask and tell, where Optuna itself is not installed."""
    if importlib.util.find_spec("optuna") is None:
        module = types.ModuleType("optuna")
        module.create_study = Study
        monkeypatch.setitem(sys.modules, "optuna", module)


def test_the_first_screen_has_the_two_commands_in_order():
    assert 0 < FIRST_SCREEN.index("\nmake search ") < FIRST_SCREEN.index("\nmake test ")
    for target in ("search", "test"):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_first_example_is_short():
    lines = [line for line in EXAMPLES[0].splitlines() if line.strip()]
    assert EXAMPLES[0] in FIRST_SCREEN
    assert len(lines) <= 10


def test_every_file_that_is_linked_exists():
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert any(target.endswith((".png", ".svg")) for target in targets)
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_every_section_that_is_linked_exists():
    headings = re.findall(r"^## (.+)$", README, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_the_examples_run_from_top_to_bottom(optuna, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, example in enumerate(EXAMPLES, 1):
        exec(compile(example, f"README.md, example {number}", "exec"), names)
    assert names["result"].best is not None
    assert names["net"].training is False
    assert names["study"].best_value <= 1.0
    assert "Scored(" in capsys.readouterr().out
