"""A row of a preferred and a rejected answer to two conversations with the same prompt.

The layouts are TRL's: prompt, chosen and rejected, all text or all lists of messages; or without a
prompt of their kind, which is then what chosen and rejected begin with in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dft.data.conversation import Conversation, RowError
from megatron_dft.data.row_values import kind_of
from megatron_dft.data.schema import NothingToTrain, parse_prompt_completion
from megatron_dft.data.training_keys import row_weight

SIDES = ("chosen", "rejected")
_READ = {"prompt", *SIDES}


def parse_pair(row: Any) -> tuple[Conversation, Conversation]:
    """(chosen, rejected) of a decoded row; only the answers train.

    Raises RowError with the reason: a side that is missing, empty or of another kind than the
    other, no prompt, a weight; NothingToTrain for a row of weight 0.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"a row must be a JSON object, not {kind_of(row)}")
    missing = [side for side in SIDES if row.get(side) is None]
    if missing:
        raise RowError(f'a pair needs "chosen" and "rejected", the row has no "{missing[0]}"')
    weight = row_weight(row)
    if not weight:
        raise NothingToTrain("the row has weight 0")
    prompt, answers = _split(row)
    shared = {k: v for k, v in row.items() if k not in _READ}
    found = [_side(shared, prompt, *side) for side in zip(SIDES, answers, strict=True)]
    if weight != 1 or any(side.weights for side in found):
        raise RowError("a pair takes no weight other than 1 or 0; leave it out")
    return found[0], found[1]


def _split(row: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """The prompt and both answers, taken out of chosen and rejected where the row has none."""
    prompt, answers = row.get("prompt"), [row[side] for side in SIDES]
    kinds = {type(answer) for answer in answers}
    if len(kinds) > 1 or not kinds <= {str, list}:
        raise RowError(
            '"chosen" and "rejected" must both be text or both be lists of messages, not '
            f"{kind_of(answers[0])} and {kind_of(answers[1])}"
        )
    if type(prompt) in kinds:
        return prompt, answers
    if prompt is not None and not isinstance(prompt, str):
        raise RowError(f'"prompt" must be of the answers\' kind, not {kind_of(prompt)}')
    # A prompt of text beside whole conversations repeats what they begin with.
    common = _common(*answers)
    if not common:
        raise RowError('the row has no "prompt", and its answers do not begin alike')
    return answers[0][:common], [answer[common:] for answer in answers]


def _common(chosen: Any, rejected: Any) -> int:
    """Items (characters or messages) that both begin with; a space before the answers is theirs."""
    same = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        same += 1
    return same - 1 if same and chosen[same - 1] == " " else same


def _side(shared: Mapping[str, Any], prompt: Any, name: str, answer: Any) -> Conversation:
    row = {**shared, "prompt": prompt, "completion": answer}
    try:
        return parse_prompt_completion(row, 1.0)
    except RowError as error:
        raise RowError(f"{name}: {str(error).replace('"completion"', 'the answer')}") from None
