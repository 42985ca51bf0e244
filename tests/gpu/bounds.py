"""How far a run may be from its reference, and why: relative differences, first step and any step.

Five steps of these tiny models, seen on a CPU: every weight moved by one part in 2²³ at random (one
rounding of fp32) moves a step's loss by at most 1.6e-7 of itself, the gradient's norm by 7e-7 and
the worst tensor of the export by 1.8e-4 of its update, where Adam has turned the sign of a gradient
that is nothing but rounding. So:

- fp32: 1e-5 at the first step is 60 roundings of every weight; TF32, which keeps 2⁻¹¹, is 4,096 of
  them and stays outside. Five times as much later, for other kernels of optimizer and norms.
- experts: as fp32 at first. Later a token may go to another expert, where two were within a
  rounding: its own loss moves by about 1 of some 150 that a step supervises, and its gradient too.
- bf16: 2⁻⁹ in each weight and activation is 16,384 of fp32's roundings: 3e-3 in the loss and 1e-2
  in the norm, of random signs. An export in bf16 rounds a weight of 0.15 by 3e-4, a sixteenth of an
  update of 5 · 1e-3; where a gradient's sign is a rounding's, Adam turns a whole step.
- fp8: 2⁻⁴ in e4m3, 32 times bf16's, in the products of the layers alone (two thirds of them all).

A lost gradient or a wrong weight moves the norm by tens of percent, and its tensor's update wholly.
"""

BOUNDS: dict[str, dict[str, tuple[float, float]]] = {
    "fp32": {
        "lm loss": (1e-5, 5e-5),
        "grad_norm": (1e-5, 2e-4),
        "weights": (0, 1e-2),
        "drift": (0, 1e-4),
    },
    "experts": {
        "lm loss": (1e-5, 2e-3),
        "grad_norm": (1e-5, 3e-2),
        "weights": (0, 1e-1),
        "drift": (0, 1e-3),
    },
    "bf16": {
        "lm loss": (5e-3, 5e-3),
        "grad_norm": (3e-2, 6e-2),
        "weights": (0, 0.5),
        "drift": (0, 2e-2),
    },
    "fp8": {
        "lm loss": (2.5e-2, 2.5e-2),
        "grad_norm": (1e-1, 2e-1),
        "weights": (0, 1.0),
        "drift": (0, 5e-2),
    },
}
