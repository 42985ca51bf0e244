"""`megatron-dft plan`: its arithmetic against real ranks, its refusals, its simulation."""

import json

import pytest

from megatron_dft import cli
from megatron_dft.cluster import memory, model_shape
from tests.hf.tiny import make_tiny
from tests.recovery.runs import run
from tests.train.launch import flags

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


def plan(capsys, *words):
    status = cli.main(["plan", *words])
    return status, *capsys.readouterr()


def test_layouts_and_flags(llama_70b, capsys):
    status, out, _ = plan(capsys, llama_70b, "--nodes", "8", "--tensor-model-parallel-size", "8",
                          "--pipeline-model-parallel-size", "4")  # fmt: skip
    assert status == 0
    assert "70.55 B parameters on 8 × 8 GPUs" in out
    assert "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --sequence" in out
    row = next(line for line in out.splitlines() if line.split()[:2] == ["8", "4"])
    assert "15.8%" in row


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
