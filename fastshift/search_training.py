"""What trains in a search: the warm-up of a fresh head, then the shift."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from fastshift.prefetch import PrefetchedTrain
from fastshift.search_options import SearchOptions
from fastshift.shift import HeadWarmup, Shifter
from fastshift.supernet import ChainSupernet

__all__ = ["SearchTraining"]


class SearchTraining:
    """The trainers of a search.

    Args:
        supernet: to train.
        data: with `train` batches.
        options: of the search.
        fresh_head: the head is new, as in a transfer.
        seed: of every random choice.
        precision: `fp32` or `bf16`.

    Attributes:
        shifter: None where the supernet does not move.
        warmup: None where there is none.
        warmup_steps: its length.

    Raises:
        ConfigError: nothing would ever train a fresh head.
        ConstraintError: no architecture satisfies the constraints.
    """

    def __init__(
        self,
        supernet: ChainSupernet,
        data: Any,
        options: SearchOptions,
        *,
        fresh_head: bool,
        seed: int,
        precision: str,
    ) -> None:
        common = {"constraints": options.constraints, "seed": seed, "precision": precision}
        self.shifter = self.warmup = self._train = None
        self.warmup_steps = options.warmup_steps(fresh_head)
        if options.moves or self.warmup_steps:
            device = next(supernet.parameters()).device
            self._train = PrefetchedTrain(data.train, device)
            data = SimpleNamespace(train=self._train)  # the parts take turns in it
        if options.moves:
            self.shifter = Shifter(
                supernet,
                data,
                options,
                population=options.population,
                subtrie_size=options.subtrie_size,
                **common,
            )
        if self.warmup_steps:
            self.warmup = HeadWarmup(supernet, data, options, **common)

    @property
    def is_warming_up(self) -> bool:
        """Whether the head's warm-up has steps left."""
        return self.warmup is not None and self.warmup.position < self.warmup_steps

    @property
    def _active(self) -> Shifter | HeadWarmup | None:
        """The part whose momenta count."""
        return self.warmup if self.is_warming_up else self.shifter

    def close(self) -> None:
        """End the thread that makes batches ahead, if there is one; training may go on."""
        if self._train is not None:
            self._train.close()

    def budget(self) -> dict[str, int]:
        """What training has cost so far."""
        parts = [part.trainer for part in (self.shifter, self.warmup) if part is not None]
        return {
            "updates": sum(trainer.updates for trainer in parts),
            "train_images": sum(trainer.images for trainer in parts),
            "path_image_pairs": sum(trainer.path_images for trainer in parts),
            "skipped_updates": sum(trainer.skipped for trainer in parts),
        }

    def momenta(self) -> dict[str, Tensor]:
        """Momentum buffers by parameter name, for a checkpoint."""
        return {} if self._active is None else self._active.trainer.optimizer.momenta()

    def state(self) -> dict[str, Any]:
        """Positions, counts and generators, for a checkpoint."""
        return {
            "shifter": self.shifter.state() if self.shifter else None,
            "warmup": self.warmup.state() if self.warmup else None,
        }

    def load_state(self, state: dict[str, Any], momenta: dict[str, Tensor]) -> None:
        """Take back what `state` and `momenta` gave."""
        for name, part in (("shifter", self.shifter), ("warmup", self.warmup)):
            if part is not None:
                part.load_state(state[name])
        if self._active is not None:
            self._active.trainer.optimizer.load_momenta(momenta)
