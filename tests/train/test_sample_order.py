"""Each step reads the same conversations in every layout, and after a resume at any step."""

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.train.launch import flags

STEPS, BATCH = 4, 8
LAYOUTS = {
    "tp1": (1, {}),
    "tp2-pp2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "dp4": (4, {}),
    "cp2": (2, dict(context_parallel_size=2)),
}

Rows = dict[int, list[tuple[int, ...]]]  # step → the conversations of each row, in reading order


def _read(argv: list[str]) -> tuple[int, int, Rows]:
    """(status, data-parallel rank, the rows that this rank's model was given)."""
    from megatron.core import parallel_state
    from megatron.training import get_args

    from megatron_dft import train
    from megatron_dft.data.dataset import ChatDataset

    read: Rows = {}
    plain = ChatDataset.__getitem__

    def noted(self, index):
        # --num-workers 0: a row is read when the step asks for it, not before.
        members = tuple(int(m) for m in self.plan.members(index))
        read.setdefault(get_args().curr_iteration + 1, []).append(members)
        return plain(self, index)

    ChatDataset.__getitem__ = noted
    status = train.main(argv)
    return status, parallel_state.get_data_parallel_rank(), read


def rows_of_steps(model: Path, data: Path, layout: str, **given) -> Rows:
    """The rows of each step over all replicas; the ranks of one replica read the same ones."""
    world, parallel = LAYOUTS[layout]
    words = flags(
        model, data, loss="dft", micro_batch_size=1, no_packing=None, num_workers=0,
        train_iters=STEPS, **parallel, **given,
    )  # fmt: skip
    results = run_ranks(_read, world, words, init=False)
    assert [status for status, _, _ in results] == [0] * world
    replicas: dict[int, Rows] = {}
    for _, replica, read in results:
        assert replicas.setdefault(replica, read) == read
    steps = sorted(replicas[0])
    return {
        # Micro-batches of one row: the replicas take turns within the global batch.
        step: [row for turn in zip(*(replicas[r][step] for r in sorted(replicas)), strict=True)
               for row in turn]
        for step in steps
    }  # fmt: skip


@pytest.fixture(scope="module")
def one_process(tiny_model, chats, tmp_path_factory):
    saved = tmp_path_factory.mktemp("order") / "c"
    rows = rows_of_steps(tiny_model, chats, "tp1", save=saved, save_interval=1)
    assert sorted(rows) == list(range(1, STEPS + 1))
    assert all(len(rows[step]) == BATCH for step in rows)
    assert any(len(row) > 1 for step in rows for row in rows[step])  # packed indeed
    assert len({tuple(rows[step]) for step in rows}) == STEPS
    return rows, saved


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
def test_every_layout_reads_the_same_rows(layout, one_process, tiny_model, chats):
    assert rows_of_steps(tiny_model, chats, layout) == one_process[0]


@pytest.mark.parametrize(
    ("saved_step", "layout"), [(1, "tp1"), (2, "dp4"), (3, "tp2-pp2"), (1, "cp2")]
)
def test_a_resume_at_any_step_goes_on_with_the_next_row(
    saved_step, layout, one_process, tiny_model, chats
):
    rows, saved = one_process
    rest = rows_of_steps(tiny_model, chats, layout, load=saved, ckpt_step=saved_step)
    assert rest == {step: rows[step] for step in rows if step > saved_step}
