"""A pickle's memo is no larger than its file, whichever reader meets it."""

import io
import pickle
import struct
import zipfile

import pytest
import torch

from megatron_dft.compat.safe_types import unsafe_extra_state
from megatron_dft.storage import pickle_scan, safe_pickle, shard

FAR = 2**26  # 1 GB in Python's own unpickler
# Every way to give an object a number, which int() reads as FAR.
NUMBERS = [b"r" + struct.pack("<I", FAR), b"p%d\n" % FAR, b"p6_7108_864\n", b"p +%d \n" % FAR]
BOMBS = [b"\x80\x02" + b"N" * 20 + number + b"." for number in NUMBERS]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_pickle_writes_is_whole(protocol):
    value = {
        "text": ["x" * n for n in (0, 1, 255, 256, 66_000)],
        "bytes": [b"y" * n for n in (0, 255, 256)] + [bytearray(b"z" * 300)],
        "numbers": [0, 255, 65536, -(2**31), 2**63, 10**700, 1.5, True, None],
        "others": ({1, 2}, frozenset("ab"), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), slice),
        "many": [str(n) for n in range(300)],
    }
    content = pickle.dumps(value, protocol)
    pickle_scan.check(content)
    pickle_scan.check(content + b"what follows is not read")
    for end in {*range(0, len(content) - 1, max(len(content) // 50, 1)), len(content) - 1}:
        with pytest.raises(ValueError):
            pickle_scan.check(content[:end])


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_a_far_number_is_refused_by_every_reader(bomb, tmp_path):
    with pytest.raises(ValueError, match="numbers an object"):
        pickle_scan.check(bomb)
    for content in (bomb, bomb[:2] + b"N0" * (3 << 20) + bomb[2:]):  # small and large
        with pytest.raises(ValueError, match="numbers an object"):
            safe_pickle.loads(content)
    bytes_of_state = torch.frombuffer(bytearray(bomb), dtype=torch.uint8)
    assert "numbers an object" in unsafe_extra_state([bytes_of_state])
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("archive/data.pkl", bomb)
        archive.writestr("archive/data/0", bytes(4))
    (tmp_path / "x").write_bytes(stored.getvalue())
    with pytest.raises(ValueError, match="numbers an object"):
        shard.locate(tmp_path / "x", 0, len(stored.getvalue()), (1,), torch.float32)
