"""Conversations that do not fit: refused, dropped or cut behind a whole turn, always counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dft.data.dataset import build_dataset
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.overlong import Conversations, fit_conversations, last_whole_turn
from megatron_dft.data.spec import SUPERVISED
from megatron_dft.data.store import Block, TokenStore
from tests.data.fixtures import chat, chatml_tokenizer, write_jsonl


def _flagged(text):
    """ "..AA.A" to flagged tokens: A trains."""
    return np.array(
        [i | (int(SUPERVISED) if c == "A" else 0) for i, c in enumerate(text)], dtype=np.uint32
    )


def _store(*texts):
    pieces = [_flagged(t) for t in texts]
    block = Block(
        np.concatenate(pieces),
        np.array([len(p) for p in pieces]),
        np.arange(1, len(pieces) + 1),
        np.zeros(len(pieces), dtype=np.int32),
    )
    return TokenStore.from_blocks([block], {"paths": ["a.jsonl"]})


@pytest.mark.parametrize(
    "text, seq_length, kept",
    [
        ("..AA.AAA", 5, 4),  # the second turn would end one label too late
        ("..AA.AAA", 6, 4),
        ("..AA.AAA", 7, 8),  # seven positions hold eight tokens: the last is a label only
        ("..AA..A.A", 6, 7),  # a turn that ends exactly with the row's last label
        ("..AA..A.A", 5, 4),
        ("..AAAAAA", 4, 0),  # not even one turn is whole
        ("....AA", 2, 0),
    ],
)
def test_it_is_cut_behind_the_last_whole_turn(text, seq_length, kept):
    assert (
        len(text) if len(text) - 1 <= seq_length else last_whole_turn(_flagged(text), seq_length)
    ) == kept


@given(st.text("A.", min_size=3, max_size=40).filter(lambda t: "A" in t[1:]), st.integers(1, 40))
def test_a_cut_conversation_fits_and_ends_with_a_turn(text, seq_length):
    text = text[: text.rindex("A") + 1]
    if len(text) < 2 or len(text) - 1 <= seq_length:
        return
    cut = last_whole_turn(_flagged(text), seq_length)
    whole = [i + 1 for i in range(1, len(text) - 1) if text[i] == "A" and text[i + 1] == "."]
    assert cut == max([e for e in whole if e - 1 <= seq_length], default=0)


def test_each_choice_is_counted():
    stores = [_store("..AA.AAA", "..A", ".AAAAAAA"), _store(".A")]
    with pytest.raises(ValueError, match=r"2 of 3 conversations .* first, a.jsonl:1, takes 7"):
        fit_conversations(stores, 4, "refuse")
    kept, ends, counts = fit_conversations(stores, 4, "drop")
    assert [k.tolist() for k in kept] == [[1], [0]] and [e.tolist() for e in ends] == [[3], [2]]
    assert counts == {"overlong_dropped": 2, "overlong_truncated": 0, "overlong_tokens_cut": 16}
    kept, ends, counts = fit_conversations(stores, 4, "truncate")
    assert [k.tolist() for k in kept] == [[0, 1], [0]] and ends[0].tolist() == [4, 3]
    assert counts == {"overlong_dropped": 1, "overlong_truncated": 1, "overlong_tokens_cut": 12}
    conversations = Conversations(stores, 4, "truncate")
    assert [len(conversations[i]) for i in range(3)] == [4, 3, 2]
    assert [conversations.where(i) for i in range(3)] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:1"]


@pytest.mark.parametrize("overlong", ["refuse", "drop", "truncate"])
def test_exactly_seq_length_positions_fit(overlong):
    kept, ends, counts = fit_conversations([_store("..AA")], 3, overlong)
    assert ends[0].tolist() == [4] and not any(counts.values())


def test_nothing_left_is_refused():
    with pytest.raises(ValueError, match="no conversation fits --seq-length 2; raise it"):
        fit_conversations([_store("....A")], 2, "truncate")


@pytest.mark.parametrize("packing", [True, False])
def test_truncated_rows_train_whole_turns_only(tmp_path, packing):
    tokenizer = chatml_tokenizer()
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("q", "one", "r", "two " * 60)}])
    data = build_dataset(
        [path], tokenizer, DatasetOptions(seq_length=64, overlong="truncate", packing=packing)
    )
    row = data[0]
    assert tokenizer.decode(row["labels"][row["loss_mask"].bool()]) == "one<|im_end|>"
    assert data.counts["overlong_truncated"] == 1
