"""Defaults, file and command line become one checked set of options, and a file again."""

from __future__ import annotations

from dataclasses import fields

import pytest
import yaml

from fastshift.config import VERBS, read_file, resolve
from fastshift.errors import ConfigError
from fastshift.pretrain import PretrainOptions
from fastshift.retrain import RetrainOptions
from fastshift.search import SearchOptions
from fastshift.settings import ConstraintOptions


def options(verb):
    return {option.name: option for section in VERBS[verb] for option in section.options()}


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_a_verb_has_a_name_of_its_own_and_a_help_text(verb):
    names = [option.name for section in VERBS[verb] for option in section.options()]
    assert len(names) == len(set(names))
    for option in options(verb).values():
        assert option.help, option.name
        assert "`" not in option.help


def test_every_field_of_the_options_is_an_option():
    search = options("search")
    for item in fields(SearchOptions):
        assert item.name in search or item.name == "constraints"
    pretrain = {item.name for item in fields(PretrainOptions)} - {"constraints"}
    assert {f"pretrain_{name}" for name in pretrain} <= search.keys()
    assert {f"retrain_{item.name}" for item in fields(RetrainOptions)} <= search.keys()
    assert pretrain | {"flops", "params"} <= options("pretrain").keys()
    assert {"batch_norm", "flops", "params", "space", "data", "supernet"} <= search.keys()


def test_the_defaults_are_those_of_the_library():
    config = resolve("search", {}, {})
    assert config.part(SearchOptions) == SearchOptions()
    assert config.part(PretrainOptions) == PretrainOptions()
    assert resolve("retrain", {}, {}).part(RetrainOptions) == RetrainOptions()


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults():
    config = resolve("search", {"seed": "3"}, {"seed": "2", "population": "30"})
    assert (config["seed"], config["population"], config["generations"]) == (3, 30, 20)


def test_a_prefixed_option_reaches_its_field():
    config = resolve("search", {"batch_norm": "batch", "pretrain_lr": "1e-3"}, {})
    assert config.part(SearchOptions).batch_norm == "batch"
    assert config.part(PretrainOptions).lr == 0.001


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "12", 12),
        ("seed", 12, 12),
        ("shift_lr", "1e-4", 1e-4),  # which PyYAML alone would read as text
        ("shift_lr", "none", None),
        ("shift_lr", 0.5, 0.5),
        ("drift", "yes", True),
        ("drift", False, False),
        ("flip", "null", None),
        ("validation_size", "0.25", 0.25),
        ("validation_size", "250", 250),
        ("classes", "3,1,4", (3, 1, 4)),
        ("classes", ["3", "1"], (3, 1)),
        ("shift", "none", "none"),
        ("flops", "290M:330M", "290M:330M"),
        ("flops", ["1M", "2M"], ["1M", "2M"]),
        ("flops", "none", None),
        ("supernet", "none", None),
    ],
)
def test_a_value_is_read_by_the_type_of_its_field(name, text, value):
    read = resolve("search", {name: text}, {})[name]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("seed", "1.0"),
        ("seed", True),
        ("seed", "none"),
        ("shift_lr", "fast"),
        ("shift_lr", "inf"),
        ("drift", "maybe"),
        ("shift", 3),
        ("classes", "1;2"),
        ("limit", [3]),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, text):
    with pytest.raises(ConfigError, match=f"^{name}: .*expected"):
        resolve("search", {name: text}, {})


def test_a_file_is_read_as_text_so_yaml_changes_no_value(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("arch: 01230\nflops: 30:40\nlr: 1e-3\nspace: no\nepochs: 7 # seven\n")
    with pytest.raises(ConfigError, match="unknown option 'flops'"):
        read_file(file, "retrain")
    file.write_text("arch: 01230\nlr: 1e-3\nspace: no\nepochs: 7 # seven\n")
    config = resolve("retrain", {}, read_file(file, "retrain"))
    assert [config[name] for name in ("arch", "lr", "space", "epochs")] == ["01230", 1e-3, "no", 7]


def test_a_saved_file_gives_the_same_options_again(tmp_path):
    given = {"flops": "60%", "shift": "none", "classes": "1,2", "pretrain_lr": "1e-5", "seed": "4"}
    config = resolve("search", {**given, "out": "here", "resume": True, "data": "no"}, {})
    config.save(tmp_path, {"torch": "2"})
    again = resolve("search", {}, read_file(tmp_path / "config.yaml", "search"))
    changed = {name for name in config.values if again[name] != config[name]}
    assert changed == {"resume"}  # which belongs to one call
    plain = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert plain["versions"] == {"torch": "2"}
    assert plain["classes"] == [1, 2]
    assert plain["data"] == "no"


def test_a_run_goes_on_only_with_its_own_options(tmp_path):
    config = resolve("search", {"seed": "4", "out": "a"}, {})
    config.save(tmp_path, {})
    free = {"out": "b", "resume": True, "quiet": True, "checkpoint_seconds": "1", "report": "no"}
    resolve("search", {"seed": "4", **free}, {}).check_same(tmp_path)
    other = resolve("search", {"seed": "5"}, {})
    with pytest.raises(ConfigError, match="seed=4, this one 5; give the same options"):
        other.check_same(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        config.check_same(tmp_path)


def test_an_error_of_a_section_carries_its_prefix():
    with pytest.raises(ConfigError, match=r"^pretrain_steps: 0; expected at least 1"):
        resolve("search", {"pretrain_steps": "0"}, {}).check()
    with pytest.raises(ConfigError, match=r"^retrain_epochs: 0"):
        resolve("search", {"retrain_epochs": "0"}, {}).check()


def test_what_is_missing_is_named_with_what_was_expected():
    with pytest.raises(ConfigError, match=r"^--space is missing; expected a ready-made space"):
        resolve("search", {}, {}).require("space")
    with pytest.raises(ConfigError, match=r"^SCORES is missing; expected CSV"):
        resolve("rank", {}, {}).require("scores")


def test_constraints_are_those_that_were_given():
    config = resolve("search", {"flops": "60%"}, {})
    assert config.part(ConstraintOptions).given() == {"flops": "60%"}


def test_the_constraints_of_a_search_are_not_those_of_its_pre_training():
    config = resolve("search", {"flops": "60%"}, {})
    assert config.part(PretrainOptions).constraints == {}
    [title] = [section.title for section in VERBS["search"] if section.kind is PretrainOptions]
    assert "whole space" in title
