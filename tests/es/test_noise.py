"""Noise by counter: the generator's published answers, and the same bits in whatever block."""

import hashlib
import math
import statistics

import pytest
import torch

from megatron_dft.es import noise
from megatron_dft.es.noise import matrix_shape, member_seed, normal, normal_like, philox4x32

WORD = 0xFFFFFFFF

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_generator_gives_its_published_answers(counter, key, words):
    found = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(key))
    assert [int(w) for w in found] == words


def reference(seed, name, row, column):
    """One element, in Python's own integers and float64."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    k = [int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")]
    c = [column // 4, row, 0, 0]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & WORD, (a >> 32) ^ c[3] ^ k[1], a & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return statistics.NormalDist().inv_cdf((c[column % 4] + 0.5) / 2**32)


def test_an_element_is_the_inverse_normal_of_its_word():
    found = normal(7, "a.weight", range(3, 9), range(5, 16))
    assert found.dtype == torch.float32
    for r in range(6):
        for c in range(11):
            expected = reference(7, "a.weight", r + 3, c + 5)
            assert found[r, c].item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_any_block_has_the_bits_of_the_whole(monkeypatch):
    whole = normal(1, "w", range(40), range(50))
    for rows, columns in [
        (range(40), range(50)),
        (range(7, 20), range(3, 41)),
        (range(39, 40), range(49, 50)),
    ]:
        part = whole[rows.start : rows.stop, columns.start : columns.stop]
        assert torch.equal(normal(1, "w", rows, columns), part)
    monkeypatch.setitem(noise._BLOCK_ELEMENTS, "cpu", 64)
    assert torch.equal(normal(1, "w", range(40), range(50)), whole)


def test_it_is_normal_and_independent_of_other_seeds_names_and_neighbours():
    n = 400 * 500
    one = normal(1, "w", range(400), range(500)).double()
    for k, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        variance = {1: 1, 2: 2, 3: 15, 4: 96}[k]
        assert abs((one**k).mean() - moment) < 4 * math.sqrt(variance / n), k
    others = [
        normal(2, "w", range(400), range(500)),
        normal(1, "v", range(400), range(500)),
        normal(1, "w", range(1, 401), range(500)),
        normal(1, "w", range(400), range(1, 501)),
        normal(1, "w", range(400), range(4, 504)),
    ]
    for other in others:
        assert abs((one * other).mean()) < 4 / math.sqrt(n)


def test_tensors_of_any_number_of_axes():
    assert matrix_shape(()) == (1, 1) and matrix_shape((5,)) == (1, 5)
    assert matrix_shape((5, 2, 3)) == (5, 6)
    flat = normal_like(1, "w", torch.empty(5, 6))
    assert torch.equal(normal_like(1, "w", torch.empty(5, 2, 3)), flat.reshape(5, 2, 3))
    assert normal_like(1, "w", torch.empty(5)).shape == (5,)


def test_members_have_seeds_of_their_own():
    seeds = {member_seed(s, i, m) for s in (1, 2) for i in range(20) for m in range(30)}
    assert len(seeds) == 2 * 20 * 30 and max(seeds) < 2**63
