"""The estimate of a step's seconds: the measured step, the parts by hand, what slows it down."""

import dataclasses

import pytest

from megatron_dft.cluster import memory, model_shape, speed

QWEN_1_5B = model_shape.shape_of(
    dict(
        model_type="qwen2", hidden_size=1536, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, intermediate_size=8960, vocab_size=151936, tie_word_embeddings=True,
    )
)  # fmt: skip


def test_the_measured_step():
    """One H200, 4 rows of 4,096 tokens: 630 ms a step, 26,000 tokens/s."""
    job, on = memory.Job(4096, 4), speed.Cluster(speed.GPUS["h200"])
    alone = memory.Layout(1, 1, 1, 1)
    assert speed.step_seconds(QWEN_1_5B, job, alone, on) == pytest.approx(0.630, rel=0.03)
    assert speed.tokens_per_second(QWEN_1_5B, job, alone, on) == pytest.approx(26_000, rel=0.03)


def test_the_speed_is_the_arithmetic_it_says():
    """A step of TP 2 × PP 2 × DP 2 put together by hand, part by part."""
    job, layout = memory.Job(4096, 16), memory.Layout(2, 2, 1, 2)
    on = speed.Cluster(speed.GPUS["h100"], gpus_per_node=4)
    h, layers, tokens = 1536, 14, 4096
    attention = h * (12 + 2 * 2) * 128 + (12 + 4) * 128 + h * h + 2 * h
    flops = tokens * (2 * (attention + 3 * h * 8960) + 2 * 1536 * 4096) / 2
    forward = layers * flops / 6e14
    vocab = 152064 / 2
    head = 3 * 2 * tokens * vocab * h / 6e14 + 58 * tokens * vocab / 2.45e12
    transfers = layers * 8 * tokens * h * 2 / 2 / (0.8 * 450e9)
    micro = 3 * forward + layers * 200 * 13e-6 + transfers + head
    held = layers * (h * 2048 / 2 + 2048 / 2 + h * h / 2 + 2 * h + 3 * h * 8960 / 2) + vocab * h
    # TP 2 × DP 2 of each stage stay inside four GPUs.
    link = 0.8 * 450e9
    hidden = max(0, 4 * held / 2 / link - 2 * forward) + max(0, 2 * held / 2 / link - forward)
    want = micro * (8 + 1) + hidden + 32 * held / 2 / 2.45e12
    assert speed.step_seconds(QWEN_1_5B, job, layout, on) == pytest.approx(want, rel=1e-6)


def test_what_makes_a_step_slower_does():
    on, job = speed.Cluster(speed.GPUS["h100"]), memory.Job(4096, 32)
    small = speed.Cluster(speed.GPUS["h100"], gpus_per_node=2)

    def seconds(layout=(2, 1, 2, 4), on=on, **given):
        changed = dataclasses.replace(job, **given)
        return speed.step_seconds(QWEN_1_5B, changed, memory.Layout(*layout), on)

    for slower in (
        seconds(recompute=True), seconds(reference=True), seconds(kl=True), seconds(chunk=1024),
        seconds(on=small), seconds((2, 1, 4, 2)), seconds(global_batch=36),
    ):  # fmt: skip
        assert slower > seconds()
    assert seconds((1, 1, 1, 8)) < seconds((1, 2, 1, 4))
    assert seconds(on=speed.Cluster(speed.GPUS["h200"])) < seconds()
