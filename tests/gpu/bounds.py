"""How far a run may be from its reference, and why: relative differences, first step and any step.

Five steps of these tiny models, seen on a CPU: every weight moved by one part in 2²³ at random (one
rounding of fp32) moves a step's loss by at most 5.4e-7 of itself, the gradient's norm by 1.1e-6 and
the worst tensor of the export by 1.4e-4 of its update, where Adam has turned the sign of a gradient
that is nothing but rounding. So:

- fp32: 1e-5 at the first step, some 40 roundings of every weight; TF32, which keeps 2⁻¹¹, is 4,096
  of them and stays outside. Three and ten times as much later.
- experts: as fp32 at first. Later a token may go to another expert, where two were within a
  rounding: its own loss moves by about 1 of some 150 that a step supervises, and its gradient too.
- bf16: the rehearsal's own bf16 runs are 7e-5 and 7e-4 away at first, 7.7e-3 and 1.9e-2 later;
  other kernels round elsewhere: ten times at first, three times later. Their exports are not
  compared: a bf16 weight of 0.07 is rounded by as much as a rare token's moves.
- fp8: e4m3 keeps 2⁻⁴ where bf16 keeps 2⁻⁹, 32 times as much, in the products of the layers alone.

A lost gradient or a wrong weight moves the norm by tens of percent, and its tensor's update wholly.
"""

BOUNDS: dict[str, dict[str, tuple[float, float]]] = {
    "fp32": {
        "lm loss": (1e-5, 3e-5),
        "grad_norm": (1e-5, 1e-4),
        "weights": (0, 5e-3),
        "drift": (0, 1e-4),
    },
    "experts": {"lm loss": (1e-5, 2e-3), "grad_norm": (1e-5, 3e-2)},
    "bf16": {"lm loss": (1e-3, 2e-2), "grad_norm": (1e-2, 6e-2), "drift": (0, 5e-2)},
    "fp8": {"lm loss": (2.5e-2, 5e-2), "grad_norm": (1e-1, 3e-1)},
}
