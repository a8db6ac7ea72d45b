"""The run directory of a search: its score log, checkpoints, configuration and result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fastshift import checkpoint
from fastshift.checkpoint import Checkpoint
from fastshift.durable import ScoreLog, replace_file, truncate_log
from fastshift.identity import check_identity, holds_a_run
from fastshift.result import SearchResult
from fastshift.supernet import ChainSupernet
from fastshift.versions import versions
from fastshift.weights import save_supernet

__all__ = ["SearchFiles"]


class SearchFiles:
    """What a search leaves in its run directory; `find` and `begin` come before the rest.

    Args:
        directory: made where it is missing.
        identity: what makes the run this one, JSON-able.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory, self.identity = directory, identity
        self._serial = 0
        self._log: ScoreLog | None = None

    @property
    def _scores(self) -> Path:
        return self.directory / "scores.jsonl"

    def find(self, resume: bool) -> Checkpoint | None:
        """Read the checkpoint to go on from, where the directory has one of a search.

        Args:
            resume: whether going on was asked for.

        Raises:
            CheckpointError: the directory holds another run, one that `resume` does not claim, or a
                damaged checkpoint.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        found = checkpoint.load(self.directory)
        if found is not None:
            self._serial = found.serial
            if "evolution" in found.state:
                check_identity(
                    self.directory, found.state["identity"], self.identity, resume=resume
                )
                return found
        if not resume and self._scores.exists() and self._scores.stat().st_size:
            raise holds_a_run(self.directory)
        return None

    def begin(self, found: Checkpoint | None, device: torch.device) -> None:
        """Cut the score log to what a checkpoint recorded, and leave a configuration.

        Args:
            found: the checkpoint, or None for a run from its start: lines of one that was killed
                before its first checkpoint go.
            device: where the search runs, for the record.

        Raises:
            CheckpointError: the log is shorter than recorded, or cannot be written.
        """
        truncate_log(self._scores, 0 if found is None else found.state["log_bytes"])
        self._log = ScoreLog(self._scores)
        path = self.directory / "config.yaml"
        if not path.exists():
            content = dict(self.identity) | {"versions": versions(device)}
            replace_file(path, yaml.safe_dump(content, sort_keys=False).encode())

    def append(self, line: dict[str, Any]) -> None:
        """Add one line to the score log."""
        self._log.append(line)

    def save(self, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        """Commit a checkpoint of this state, the log's length with it."""
        self._serial += 1
        state = state | {"identity": self.identity, "log_bytes": self._log.flush()}
        checkpoint.save(self.directory, self._serial, tensors=tensors, state=state)

    def finish(self, result: SearchResult, supernet: ChainSupernet) -> None:
        """Write what a finished search leaves, `result.json` last, unless it is there."""
        path = self.directory / "result.json"
        if not path.exists():
            save_supernet(supernet, self.directory, {"data": result.data})
            replace_file(path, (json.dumps(result.to_dict(), indent=1) + "\n").encode())
        self._log.close()
