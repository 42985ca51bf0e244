"""Runs that score and that train with stored scores, and what they have to agree on."""

import numpy as np

from tests.ranks import run_ranks
from tests.train.launch import flags

# The chats have about 1,500 tokens.
SEGMENT = 400


def _rank(argv, before):
    from megatron_dft import score

    if before is not None:
        before()
    return score.main(argv)


def score(world_size, argv, before=None):
    results = run_ranks(_rank, world_size, argv, before, init=False)
    assert results == [0] * world_size


def score_flags(model, data, out, **given):
    given = dict(lr=None, min_lr=None, train_iters=None, score_segment_tokens=SEGMENT) | given
    return flags(model, data, dft_reference_scores=out, **given)


def stored(directory):
    return np.fromfile(directory / "scores.f32", dtype="<f4")


PACKED = dict(no_packing=None, micro_batch_size=1, seq_length=96, global_batch_size=4)


LAYOUTS = {
    "packed": (1, PACKED),
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
    "dp2-packed": (2, PACKED),
    "tp2-sp-packed-chunked": (
        2,
        dict(tensor_model_parallel_size=2, sequence_parallel=True, loss_chunk_size=16, **PACKED),
    ),
    "cp2-packed": (2, dict(context_parallel_size=2, **PACKED)),
    "pp2-dp2": (4, dict(pipeline_model_parallel_size=2)),
}


# A learning rate at which the weight leaves 1 within three steps.
FAR = dict(lr=2e-2, min_lr=2e-2, train_iters=3)


RUNS = {
    "unpacked": (1, {}, {}),
    # The scores were made from other rows in another order.
    "packed": (1, dict(seed=7, **PACKED), {}),
    "tp2-sp, chunked": (
        2,
        dict(tensor_model_parallel_size=2, sequence_parallel=True, loss_chunk_size=16),
        {},
    ),
    "cp2, packed": (2, dict(context_parallel_size=2, **PACKED), {}),
    # The frozen model does not run there.
    "virtual stages": (
        2,
        dict(PACKED),
        dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1),
    ),
}


PAIRS = [
    ("unpacked", "iw-sft"),
    ("unpacked", "psft"),
    ("packed", "iw-sft"),
    ("packed", "psft"),
    ("tp2-sp, chunked", "psft"),
    ("cp2, packed", "iw-sft"),
    ("virtual stages", "psft"),
]


def no_frozen_model():
    from megatron_dft.training import reference_model

    def built(*args):
        raise AssertionError("a frozen model was built")

    reference_model.ReferenceModel.__init__ = built


def die_after_two_segments():
    from megatron_dft.data.reference_scores import ScoreWriter

    write = ScoreWriter.write

    def dying(self, segment, scores):
        if segment == 2:
            (self._path(segment).with_suffix(".partial")).write_bytes(b"half")
            raise KeyboardInterrupt
        write(self, segment, scores)

    ScoreWriter.write = dying


def hear_segments():
    from megatron_dft.data.reference_scores import ScoreWriter

    write = ScoreWriter.write

    def heard(self, segment, scores):
        with open(self._directory / "heard", "a") as file:
            file.write(f"{segment}\n")
        write(self, segment, scores)

    ScoreWriter.write = heard


def iw_sft(model, data, scores, **given):
    return flags(model, data, **dict(loss="iw-sft", dft_reference_scores=scores) | given)


def _refusal(entry, argv):
    import contextlib
    import importlib
    import io

    from megatron_dft.training import model

    def built(*args, **kwargs):
        raise AssertionError("a model was built")

    model.model_config = built
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        status = importlib.import_module(f"megatron_dft.{entry}").main(argv)
    return status, text.getvalue()


def is_refused(entry, argv, words):
    ((status, text),) = run_ranks(_refusal, 1, entry, argv, init=False)
    assert status == 2, text
    assert "Traceback" not in text
    for word in ("--dft-reference-scores", *words):
        assert word in text.strip().splitlines()[-1], text


TRAINING = {
    "both": (dict(dft_reference_model="x"), ["--dft-reference-model"]),
    "asft": (dict(loss="asft"), ["asft", "whole distribution"]),
    "KL": (dict(kl_coeff=0.1), ["--kl-coeff", "whole distribution"]),
    "nothing to compare": (dict(loss="dft"), ["--loss dft", "iw-sft"]),
    "no scores": (dict(dft_reference_scores="/nowhere"), ["'/nowhere'", "no scores"]),
    "cut elsewhere": (
        dict(seq_length=34, overlong="drop"),
        ["was --seq-length 64 with --overlong refuse", "is --seq-length 34"],
    ),
}


def check_content(directory, cache):
    from megatron_dft.data.reference_scores import ReferenceScores

    (cache / "hashes").mkdir(exist_ok=True)
    ReferenceScores(directory).check_content(cache)
