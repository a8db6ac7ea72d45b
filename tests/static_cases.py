"""Data and an evaluator for the tests of steps over static buffers."""

from __future__ import annotations

from fastshift import Evaluator
from fastshift.testing import synthetic_data

DATA = synthetic_data()


def evaluator_of(net, policy="recalibrate", size=5, **options):
    """An evaluator on the data, its sub-tries small."""
    return Evaluator(
        net,
        DATA.validation,
        calibration=DATA.calibration,
        batch_norm=policy,
        subtrie_size=size,
        **options,
    )
