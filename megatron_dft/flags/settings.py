"""What the flags of a run come to, for the rest of the program."""

from dataclasses import dataclass

from megatron_dft.flags.route import LossRoute
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.losses.registry import Objective


@dataclass(frozen=True)
class Settings:
    """What no single flag holds.

    objective             --loss and its parameters
    route                 where the loss is computed
    checkpoint            the opened --hf-model
    vocab_size            the model's own, without Megatron's padding; None: as padded
    reference_checkpoint  the base that a frozen model is made of; None: nothing is compared, or
                          stored scores serve
    weighs_normalizer     a step's loss is divided by the sum of the data's weights, else by the
                          number of supervised tokens
    whole_evaluation      each evaluation reads the validation data once, all of it
    full_weight           bits of the rows' token_kinds: tokens of these kinds take weight 1
    reference_scores      directory of a reference's stored log-probabilities, which the training
                          rows then carry
    """

    objective: Objective
    checkpoint: HFCheckpoint | None
    vocab_size: int | None
    route: LossRoute
    reference_checkpoint: HFCheckpoint | None = None
    reference_scores: str | None = None
    full_weight: int = 0
    whole_evaluation: bool = False
    weighs_normalizer: bool = False


_settings: Settings | None = None


def settings() -> Settings:
    """The settings of this run; set when the command line has been parsed."""
    assert _settings is not None, "the command line has not been parsed"
    return _settings


def set_settings(found: Settings) -> None:
    """For resolve.py: the command line has been parsed."""
    global _settings
    _settings = found
