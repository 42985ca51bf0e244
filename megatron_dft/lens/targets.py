"""Target mode: the anchors' coefficients follow a measured KL or relative norm, in a run.

--kl-target holds the KL of each step's global batch by --kl-coeff, --relative-norm-target the
model's ‖θ − θ₀‖/‖θ₀‖ by --l2sp-coeff; the flags give the coefficients to start from. What is
measured is known to the last rank (the KL to its pipeline stage alone); all ranks take its value,
so that no rank's coefficient can differ by a rounding. The controllers' state lies in Megatron's
args, which every checkpoint carries.
"""

from typing import Any

import torch
import torch.distributed as dist

from megatron_dft.compat.loop import on_checkpoint_args
from megatron_dft.lens.anchor import L2SP
from megatron_dft.lens.controller import TargetController
from megatron_dft.lens.tracker import MODEL

KL = "dft/kl"
KL_COEFFICIENT, L2SP_COEFFICIENT = "dft/kl-coeff", "dft/l2sp-coeff"
RELATIVE_NORM = "dft/relative-norm"


class Targets:
    """The controllers of a run, none where no target is set.

    args: Megatron's; `kl_coeff` is what the loss reads in each step and is changed in place.
    anchors: the list that will hold this rank's L2-SP anchors.
    """

    def __init__(self, args: Any, anchors: list[L2SP]) -> None:
        self.args, self.anchors = args, anchors
        self.controllers: dict[str, TargetController] = {}
        if args.kl_target is not None:
            self.controllers["kl"] = TargetController(args.kl_target, args.kl_coeff)
        if args.relative_norm_target is not None:
            self.controllers["norm"] = TargetController(args.relative_norm_target, args.l2sp_coeff)
        self._kl: Any = None
        self._norm = float("nan")
        if self.controllers:
            on_checkpoint_args(self._restore)

    @property
    def needs_norm(self) -> bool:
        """Whether each step's relative norm is wanted."""
        return "norm" in self.controllers

    def before_log(self, losses: dict[str, Any]) -> None:
        """Hear this step's KL; Megatron logs what is added: the coefficients of this step.

        losses: name → mean of the step, on the last pipeline stage; elsewhere empty, as it is
        after a skipped step.
        """
        self._kl = losses.get(KL)
        if not losses:
            return
        for name, key in (("kl", KL_COEFFICIENT), ("norm", L2SP_COEFFICIENT)):
            if name in self.controllers:
                losses[key] = torch.tensor(self.controllers[name].coefficient)
        if self.needs_norm and self._norm == self._norm:  # measured after the step before
            losses[RELATIVE_NORM] = torch.tensor(self._norm)

    def after_step(self, drift: dict[str, dict[str, float]] | None) -> None:
        """Set the coefficients of the next step. Collective. drift: the tracker's measurement."""
        if not self.controllers:
            return
        self._norm = drift[MODEL]["relative_norm"] if drift else float("nan")
        kl = float("nan") if self._kl is None else float(self._kl)
        # Float64 on the device of the group's backend; NaN: not measured in this step.
        measured = torch.tensor([kl, self._norm], dtype=torch.float64, device="cuda")
        dist.broadcast(measured, src=dist.get_world_size() - 1)
        for name, value in zip(("kl", "norm"), measured.tolist(), strict=True):
            if name in self.controllers and value == value:
                self.controllers[name].update(value)
        self._apply()
        self.args.dft_targets = {n: c.state_dict() for n, c in self.controllers.items()}

    def _apply(self) -> None:
        if "kl" in self.controllers:
            self.args.kl_coeff = self.controllers["kl"].coefficient
        if "norm" in self.controllers:
            for anchor in self.anchors:
                anchor.coefficient = self.controllers["norm"].coefficient

    def _restore(self, saved: Any) -> None:
        """Go on where the checkpoint stopped; one without this target leaves the flags' start."""
        for name, state in (getattr(saved, "dft_targets", None) or {}).items():
            if name in self.controllers:
                self.controllers[name].load_state_dict(state)
        self._apply()
