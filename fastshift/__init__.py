"""FastShift: fast one-shot neural architecture search by Supernet Shifting."""

from __future__ import annotations

__version__ = "0.1.0"

from fastshift import data, errors, ops, spaces
from fastshift.compiled import CompiledSupernet
from fastshift.constraints import Constraint, parse_constraints
from fastshift.errors import FastShiftError
from fastshift.evaluator import Evaluator, Scores
from fastshift.export import export
from fastshift.ops import Frame, Head, Op, Unit
from fastshift.population import Evolution, Scored
from fastshift.pretrain import PretrainOptions, PretrainResult, pretrain
from fastshift.report import write_report
from fastshift.result import SearchResult
from fastshift.retrain import Retrained, RetrainOptions, retrain
from fastshift.sampler import FeasibleSampler
from fastshift.search import Search, SearchOptions, search, transfer
from fastshift.space import SearchSpace
from fastshift.supernet import ChainSupernet, Supernet, recalibrate
from fastshift.weights import load_supernet, save_supernet

__all__ = [
    "ChainSupernet",
    "CompiledSupernet",
    "Constraint",
    "Evaluator",
    "Evolution",
    "FastShiftError",
    "FeasibleSampler",
    "Frame",
    "Head",
    "Op",
    "PretrainOptions",
    "PretrainResult",
    "RetrainOptions",
    "Retrained",
    "Scored",
    "Scores",
    "Search",
    "SearchOptions",
    "SearchResult",
    "SearchSpace",
    "Supernet",
    "Unit",
    "data",
    "errors",
    "export",
    "load_supernet",
    "ops",
    "parse_constraints",
    "pretrain",
    "recalibrate",
    "retrain",
    "save_supernet",
    "search",
    "spaces",
    "transfer",
    "write_report",
]
