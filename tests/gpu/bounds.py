BOUNDS: dict[str, dict[str, tuple[float, float]]] = {
    "fp32": {
        "lm loss": (1e-5, 2e-4),
        "grad_norm": (1e-5, 5e-3),
        "weights": (0, 1e-2),
        "drift": (0, 1e-3),
    },
    "experts": {
        "lm loss": (1e-5, 2e-4),
        "grad_norm": (1e-5, 5e-3),
        "weights": (0, 1e-2),
        "drift": (0, 1e-3),
    },
    "bf16": {
        "lm loss": (5e-3, 5e-3),
        "grad_norm": (3e-2, 6e-2),
        "weights": (0, 1),
        "drift": (0, 1),
    },
    "fp8": {
        "lm loss": (2.5e-2, 2.5e-2),
        "grad_norm": (1e-1, 2e-1),
        "weights": (0, 1),
        "drift": (0, 1),
    },
}
