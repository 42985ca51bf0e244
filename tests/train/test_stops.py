"""A model is trained to answer and to stop, leaves, and does both where transformers loads it."""

import json

import pytest

from tests.hf.tiny import make_tiny
from tests.ranks import run_ranks
from tests.train.launch import flags, run_train

PAD, END = 256, 258  # END is the eos of the base model and of its tokenizer
ANSWERS = {"a?": "xyz", "b?": "mn", "c?": "kkkk", "d?": "w"}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}ENDS\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def settings(**given):
    """40 new tokens are more than any answer."""
    values = dict(
        seq_length=32, micro_batch_size=4, global_batch_size=4, train_iters=60, lr=1e-2,
        min_lr=1e-3, lr_decay_style="cosine", lr_warmup_iters=3, weight_decay=0.0,
    )  # fmt: skip
    return values | given


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(base model, data, templates, export, checkpoint): turns end with a token that ends nothing
    in the base model."""
    root = tmp_path_factory.mktemp("stops")
    base = make_tiny("llama", root / "base", num_hidden_layers=2, initializer_range=0.05)
    (base / "chat_template.jinja").unlink()
    data = root / "data.jsonl"
    turns = [[("user", q), ("assistant", a)] for q, a in ANSWERS.items()]
    rows = [{"messages": [{"role": r, "content": c} for r, c in one]} for one in turns]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, token in (("pad", "<|pad|>"), ("end", "<|im_end|>")):
        (root / f"{name}.jinja").write_text(TEMPLATE.replace("ENDS", token))
    run_train(
        1,
        *flags(
            base, data, loss="sft", chat_template=root / "pad.jinja", save_hf=root / "export",
            save=root / "ckpt", save_interval=1000, **settings(),
        ),
    )  # fmt: skip
    return root


def answers(directory, **generation) -> dict[str, list[int]]:
    """What the model says to each question, by the defaults of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    found = {}
    for question in ANSWERS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**prompt, max_new_tokens=40, **generation)
        found[question] = out[0, prompt["input_ids"].shape[1] :].tolist()
    return found


def expected(end: int) -> dict[str, list[int]]:
    from tests.hf.tiny import tiny_tokenizer

    return {q: [*tiny_tokenizer()(a)["input_ids"], end] for q, a in ANSWERS.items()}


def test_the_export_answers_and_stops(trained):
    assert answers(trained / "export") == expected(PAD)
    # The base's eos alone would not have stopped it.
    talking = answers(trained / "export", eos_token_id=END)
    assert all(len(said) == 40 for said in talking.values())


def export_offline(root) -> int:
    from megatron_dft import cli

    return cli.main(["export", str(root / "ckpt"), str(root / "offline")])


def test_an_export_of_its_checkpoint_is_the_same(trained):
    (trained / "pad.jinja").rename(trained / "moved.jinja")  # the checkpoint keeps the text
    assert run_ranks(export_offline, 1, trained, init=False) == [0]
    (trained / "moved.jinja").rename(trained / "pad.jinja")
    for file in (trained / "export").iterdir():
        if file.name != "README.md":
            assert (trained / "offline" / file.name).read_bytes() == file.read_bytes(), file.name


def test_full_weight_teaches_an_end_that_dft_does_not(trained):
    """The model knows the answers and another end: p of the new one is next to nothing."""

    def run(name, ranks=1, **given):
        slow = dict(lr=3e-3, lr_decay_style="constant", train_iters=45)
        given = settings(chat_template=trained / "end.jinja", **slow) | given
        out = dict(save_hf=trained / name) if name else {}
        return run_train(ranks, *flags(trained / "export", trained / "data.jsonl", loss="dft",
                                       **out, **given))  # fmt: skip

    without, full = run("without"), run("full", dft_full_weight="end")
    assert without[0]["dft/end-prob"] < 0.05
    assert without[-1]["dft/end-prob"] < 0.3 < 0.9 < full[-1]["dft/end-prob"]
    assert answers(trained / "full") == expected(END)
    # The rest is as without: the first step differs by (1 − p)·(−log p) of the ends alone.
    assert full[0]["lm loss"] == without[0]["lm loss"]
    assert full[0]["dft/mean-weight"] > without[0]["dft/mean-weight"]
    # Another layout, route and packing have the same first step.
    (other,) = run(
        None, ranks=2, dft_full_weight="end", context_parallel_size=2, loss_chunk_size=8,
        micro_batch_size=1, no_packing=None, global_batch_size=1, train_iters=1, seq_length=128,
        lr_warmup_iters=0,
    )  # fmt: skip
    for key in ("dft loss", "dft/end-prob", "dft/mean-weight"):
        assert other[key] == pytest.approx(full[0][key], rel=1e-5), key
