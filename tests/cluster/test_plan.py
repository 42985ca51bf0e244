"""`megatron-dft plan`: its arithmetic against real ranks, its refusals, its simulation."""

import json

import pytest

from megatron_dft import cli
from megatron_dft.cluster import memory, model_shape
from tests.hf.tiny import make_tiny
from tests.recovery.runs import run
from tests.train.launch import flags
from tools import plan_comments

LLAMA_70B = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=8192,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    intermediate_size=28672,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    rope_theta=500000.0,
    tie_word_embeddings=False,
)


@pytest.fixture
def llama_70b(tmp_path):
    path = tmp_path / "70b" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA_70B))
    return str(path.parent)


def _measure():
    """Print what this rank holds when training has ended."""
    from megatron_dft.training import output

    def finish(self):
        weights = grads = 0
        for chunk in self.handle.chunks:
            weights += sum(p.numel() * p.element_size() for p in chunk.parameters())
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                grads += buffer.grad_data.numel() * buffer.grad_data.element_size()
        print("HELD", weights, grads, STATE["optimizer"]())

    from megatron.training import training

    STATE = {}
    plain = training.setup_model_and_optimizer

    def setup(*args, **kwargs):
        model, optimizer, scheduler = plain(*args, **kwargs)

        def held():
            total = 0
            inner = getattr(optimizer, "chained_optimizers", [optimizer])
            for one in inner:
                state = one.optimizer.state
                for entry in state.values():
                    total += sum(
                        entry[k].numel() * entry[k].element_size()
                        for k in ("exp_avg", "exp_avg_sq")
                    )
            return total

        STATE["optimizer"] = held
        return model, optimizer, scheduler

    training.setup_model_and_optimizer = setup
    output.Output.finish = finish


LAYOUTS = [
    ("llama", dict(tensor_model_parallel_size=2), memory.Layout(2, 1, 1, 1)),
    ("qwen2", dict(pipeline_model_parallel_size=2), memory.Layout(1, 2, 1, 1)),
    ("qwen3-moe", dict(expert_model_parallel_size=2), memory.Layout(1, 1, 1, 2, 2)),
    ("llama", dict(use_distributed_optimizer=True), memory.Layout(1, 1, 1, 2)),
]


@pytest.mark.parametrize(("kind", "given", "layout"), LAYOUTS)
def test_weights_and_optimizer_are_what_a_rank_really_holds(kind, given, layout, chats, tmp_path):
    # Wide enough that the padding of Megatron's buffers is not what is measured.
    model = make_tiny(kind, tmp_path / "m", hidden_size=128, intermediate_size=320)
    shape = model_shape.shape_of(model_shape.read_config(str(model)))
    shared = "use_distributed_optimizer" in given
    job = memory.Job(64, 8, bf16=False, distributed_optimizer=shared, vocab_multiple=8)
    ended = run(
        2,
        *flags(model, chats, train_iters=1, **given),
        status=tmp_path / "status",
        before=_measure,
    )
    for rank, text in enumerate(ended.texts):
        held = [int(n) for n in text.split("HELD ")[1].split("\n")[0].split()]
        stage = rank if layout.pipeline > 1 else 0
        expected = memory.states(shape, job, layout, stage)
        for name, ours, theirs in zip(
            ("weights", "gradients", "optimizer"), expected, held, strict=True
        ):
            assert ours == pytest.approx(theirs, rel=0.05), (rank, name)


def test_known_sizes():
    shape = model_shape.shape_of(LLAMA_70B)
    assert shape.total() == 70_553_706_496  # the published parameter count
    # Korthikanti's 34·s·b·h a layer, for Llama's proportions within a few per cent.
    one = model_shape.shape_of(LLAMA_70B | {"num_hidden_layers": 1})
    job = memory.Job(4096, 1)
    size = memory._activations(one, job, memory.Layout(1, 1, 1, 1), 0)
    assert size == pytest.approx(34 * 4096 * 8192, rel=0.1)


def test_the_bubble():
    job = memory.Job(4096, 32)
    assert memory.bubble(memory.Layout(8, 4, 1, 2), job) == pytest.approx(3 / 19)
    assert memory.bubble(memory.Layout(8, 1, 1, 8), job) == 0


def flags_of(out):
    return out.splitlines()[-1].split()


def plan(capsys, *words):
    status = cli.main(["plan", *words])
    return status, *capsys.readouterr()


def test_layouts_and_flags(llama_70b, capsys):
    status, out, _ = plan(capsys, llama_70b, "--nodes", "8", "--tensor-model-parallel-size", "8",
                          "--pipeline-model-parallel-size", "4")  # fmt: skip
    assert status == 0
    assert "70.55 B parameters on 8 × 8 H100 of 80 GB" in out
    assert "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --sequence" in out
    row = next(line for line in out.splitlines() if line.split()[:2] == ["8", "4"])
    assert "15.8%" in row and flags_of(out)[-2:] == ["--loss", "dft"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nodes", "1"), "nothing fits 80 GB: the smallest needs"),
        (("--nodes", "3", "--gpus-per-node", "7"), "no layout divides"),
        (("--seq-length", "200000"), "--seq-length: the model has 131072 positions, got 200000"),
        (("--nodes", "0"), "--nodes: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(words, message, llama_70b, capsys):
    status, _, err = plan(capsys, llama_70b, *words)
    assert status == 2 and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--hours", "much"), "--hours: expected a number of tokens such as 3.2e8"),
        (("--hours", "0"), "--hours: expected a number of tokens"),
        (("--node-link", "0"), "--node-link: expected GB/s above 0, got 0"),
        (("--gpu-memory", "-1"), "--gpu-memory: expected GB above 0, got -1"),
        (("--loss", "asft", "--dft-reference-scores"), "expected no stored scores"),
    ],
)
def test_bad_flags_are_refused(words, message, llama_70b, capsys):
    status, out, err = plan(capsys, llama_70b, "--nodes", "8", *words)
    assert status == 2 and message in err and len(err.splitlines()) == 1 and not out


def rows_of(out):
    """The table's rows: name of a column → number."""
    lines = [line.split() for line in out.splitlines()]
    head = next(i for i, words in enumerate(lines) if words[:2] == ["TP", "PP"])
    names = [name for name in lines[head] if name != "GB"]
    found = []
    for words in lines[head + 1 :]:
        if not words or not words[0].isdecimal():
            break
        numbers = [float(w.strip("%").replace(",", "")) for w in words[: len(names)]]
        found.append(dict(zip(names, numbers, strict=True)))
    return found


PARTS = ("weights", "grads", "optim", "ref", "activ", "logits", "reserve")


@pytest.mark.parametrize("words", [(), ("--loss", "asft"), ("--loss-chunk-size", "512")])
def test_the_columns_add_up_and_the_best_come_first(words, llama_70b, capsys):
    status, out, _ = plan(capsys, llama_70b, "--nodes", "8", "--rows", "99", *words)
    rows = rows_of(out)
    assert status == 0 and len(rows) > 5
    for row in rows:
        assert row["sum"] == pytest.approx(sum(row[p] for p in PARTS), abs=1e-9)
        assert row["reserve"] == 6 and row["sum"] <= 80
        assert (row["ref"] > 0) == ("asft" in words)
    full = [row["sum"] > 0.92 * 80 for row in rows]
    assert full == sorted(full)
    fast = [row["tokens/s"] for row, is_full in zip(rows, full, strict=True) if not is_full]
    inside = [n for n, row in zip(fast, rows, strict=False) if row["TP"] * row["CP"] <= 8]
    assert all(b < 1.06 * a for a, b in zip(inside, inside[1:], strict=False))
    assert rows[0]["TP"] * rows[0]["CP"] <= 8


def test_the_reference_and_the_heads_buffer_are_counted():
    shape = model_shape.shape_of(LLAMA_70B)
    layout = memory.Layout(8, 8, 1, 1)

    def last(**given):
        job = memory.Job(4096, 8, **given)
        return memory._logits(shape, job, layout), memory.fullest(shape, job, layout)

    vocab = 129024 / 8  # 128,256, a multiple of 128 · 8
    assert shape.padded_vocab(8) == 129024
    assert last()[0] == 10 * 4096 * vocab
    assert last(kl=True)[0] == 2 * last()[0]
    assert last(chunk=512)[0] == 10 * 512 * vocab + 4 * 4096 * 8192
    assert last(chunk=9999)[0] == last()[0] + 4 * 4096 * 8192
    plain, held = last()[1], last(reference=True)[1]
    assert held.reference == held.weights == plain.weights and plain.reference == 0
    assert held.total - plain.total == held.weights


def test_the_layout_stays_inside_the_node_if_it_can(capsys, tmp_path):
    """Eight experts over eight GPUs of two nodes of four: EP 4 before EP 8, however fast."""
    config = LLAMA_70B | {
        "model_type": "mixtral", "hidden_size": 1024, "num_hidden_layers": 8,
        "intermediate_size": 2048, "num_local_experts": 8, "num_experts_per_tok": 2,
        "num_attention_heads": 16, "vocab_size": 32000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("--nodes", "2", "--gpus-per-node", "4", "--node-link", "10000", "--rows", "99")
    rows = rows_of(plan(capsys, str(tmp_path), *words)[1])
    outside = [row["EP"] > 4 or row["CP"] > 1 and row["TP"] * row["CP"] > 4 for row in rows]
    assert any(outside) and outside == sorted(outside)


def test_hours(llama_70b, capsys):
    said = plan(capsys, llama_70b, "--nodes", "8", "--hours", "1.5B")[1]
    rate = rows_of(said)[0]["tokens/s"]
    hours = float(said.split("1,500,000,000 tokens: about ")[1].split()[0])
    assert hours == pytest.approx(1.5e9 / rate / 3600, rel=0.06)


@pytest.mark.parametrize("config", plan_comments.configurations(), ids=lambda path: path.stem)
def test_the_comment_of_a_configuration_is_what_plan_says(config):
    assert plan_comments.with_comment(config) == config.read_text(encoding="utf-8")


def test_an_unknown_architecture_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    status, _, err = plan(capsys, str(tmp_path))
    assert status == 2 and "model_type: expected one of llama" in err


def test_the_70b_at_1024_ranks_is_simulated(llama_70b, capfd):
    status, out, err = plan(
        capfd, llama_70b, "--nodes", "128", "--global-batch-size", "256", "--simulate",
        "--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "4",
        "--context-parallel-size", "1",
    )  # fmt: skip
    assert status == 0, err
    assert "simulated 1024 ranks: flags accepted, process groups TP 8 PP 4 CP 1 EP 1 DP 32" in out
