"""Flags of the weight-update lens: distance from the base, the L2-SP anchor, held targets."""

import argparse

from megatron_dft.losses.refusals import flag_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; nothing is parsed or checked."""
    group = parser.add_argument_group("lens", "How far the weights move, and what holds them")
    group.add_argument(
        "--log-drift-interval",
        type=int,
        metavar="STEPS",
        help="log how far the weights are from --hf-model's every so many steps",
    )
    group.add_argument(
        "--l2sp-coeff",
        type=float,
        default=0.0,
        metavar="LAMBDA",
        help="pull the weights back to --hf-model's by lr · LAMBDA · (θ − θ₀) in each step "
        "(L2-SP, arXiv 1802.01483, decoupled from Adam's scaling)",
    )
    group.add_argument(
        "--kl-target",
        type=float,
        metavar="NATS",
        help="hold the mean KL(reference ‖ model) of the supervised tokens here by adapting "
        "--kl-coeff after each step, from the value given, by at most a factor of 100",
    )
    group.add_argument(
        "--relative-norm-target",
        type=float,
        metavar="SHARE",
        help="hold ‖θ − θ₀‖/‖θ₀‖ here by adapting --l2sp-coeff after each step, from the value "
        "given, by at most a factor of 100; measures the norm in every step",
    )


def check(args: argparse.Namespace) -> None:
    """Raise one ValueError for an interval, coefficient or target that means nothing."""
    if args.log_drift_interval is not None and args.log_drift_interval < 1:
        raise ValueError(
            f"--log-drift-interval: expected at least 1 step, got {args.log_drift_interval}; "
            "leave it out to log none"
        )
    if not 0 <= args.l2sp_coeff < float("inf"):
        raise ValueError(
            f"--l2sp-coeff: expected a number of 0 or more, got {args.l2sp_coeff}; 0 switches it "
            "off"
        )
    for dest, coefficient in (("kl_target", "kl_coeff"), ("relative_norm_target", "l2sp_coeff")):
        target = getattr(args, dest)
        if target is None:
            continue
        if not 0 < target < float("inf"):
            raise ValueError(
                f"{flag_of(dest)}: expected a number above 0, got {target}; leave it out to hold "
                "nothing"
            )
        if not getattr(args, coefficient):
            raise ValueError(
                f"{flag_of(dest)}: expected {flag_of(coefficient)} above 0 to start from, got 0; "
                "give both"
            )
