"""SGD that moves only the parameters that the step's paths used."""

from __future__ import annotations

import torch
from torch import Tensor

from fastshift.supernet import ChainSupernet

__all__ = ["PathSGD"]


class PathSGD(torch.optim.SGD):
    """SGD with momentum; parameters without a gradient stay bit-identical, their momenta too.

    Weight decay acts on parameters of more than one dimension only (Supernet Shifting's and SPOS's
    released code).

    Args:
        supernet: whose parameters are stepped.
        lr: learning rate of the trunk.
        momentum: of the moving sum of gradients.
        weight_decay: L2 coefficient for matrices and kernels.
        nesterov: use Nesterov's form.
        head_lr_multiplier: the head's learning rate is `lr` times this.
        drift: reproduce torch 1, where unsampled parameters had zero gradients: their momentum and
            weight decay go on moving them. For comparison only.
    """

    def __init__(
        self,
        supernet: ChainSupernet,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 4e-5,
        *,
        nesterov: bool = False,
        head_lr_multiplier: float = 1.0,
        drift: bool = False,
    ) -> None:
        self.names = {p: name for name, p in supernet.named_parameters()}
        self.drift = drift
        groups = []
        head = list(supernet.head.parameters())
        for params, scale in ((supernet.trunk_parameters(), 1.0), (head, head_lr_multiplier)):
            for decays in (True, False):
                chosen = [p for p in params if (p.dim() > 1) == decays]
                if chosen:
                    decay = weight_decay if decays else 0.0
                    groups.append({"params": chosen, "weight_decay": decay, "lr_scale": scale})
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=nesterov)
        self.set_lr(lr)

    def set_lr(self, lr: float) -> None:
        """Set the trunk's learning rate; the head's follows by its multiplier."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def step(self, closure=None):
        """Make one update from the gradients that are there."""
        if self.drift:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None and p.requires_grad:
                        p.grad = torch.zeros_like(p)
        return super().step(closure)

    def momenta(self) -> dict[str, Tensor]:
        """Momentum buffers by parameter name, for a checkpoint."""
        found = {}
        for p, state in self.state.items():
            if state.get("momentum_buffer") is not None:
                found[self.names[p]] = state["momentum_buffer"]
        return found

    @torch.inference_mode(False)
    def load_momenta(self, momenta: dict[str, Tensor]) -> None:
        """Take back what `momenta` gave; parameters not named have none."""
        self.state.clear()
        for p, name in self.names.items():
            if name in momenta:
                self.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momenta[name])
