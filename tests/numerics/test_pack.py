"""Packing is a dense little-endian bit stream, for every width."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import SpecError
from quantkit.numerics.pack import as_bytes, pack, packed_words, unpack


@settings(deadline=None, max_examples=150)
@given(bits=st.integers(1, 8), columns=st.integers(1, 130), rows=st.integers(1, 3), seed=st.integers(0, 1 << 16))
def test_pack_is_the_little_endian_bit_stream_and_unpack_reverses_it(bits: int, columns: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_words(columns, bits))
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        assert [word & 0xFFFFFFFF for word in words] == [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(len(words))]
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_rows_of_a_single_word_may_have_any_stride() -> None:
    codes = torch.randint(0, 16, (4, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = torch.zeros(4, 16, dtype=torch.int32)
    words[:, 0] = pack(codes, 4)[:, 0]
    odd = words[:, 0].clone().as_strided((4, 1), (1, 16))
    assert torch.equal(unpack(odd, 4, 8), codes)


def test_golden_words() -> None:
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(0)
    assert pack(codes, 4).tolist() == [[0x76543210]]
    assert pack(codes, 8).tolist() == [[0x03020100, 0x07060504]]
    assert pack(codes, 3).tolist() == [[0o76543210]]


@pytest.mark.parametrize(
    ("codes", "bits"),
    [(torch.zeros(1, 4, dtype=torch.uint8), 9), (torch.zeros(1, 4), 4), (torch.zeros(1, 4, dtype=torch.uint8), 0)],
)
def test_wrong_input_is_refused(codes: torch.Tensor, bits: int) -> None:
    with pytest.raises(SpecError, match="pack: bits="):
        pack(codes, bits)


def test_wrong_length_is_refused() -> None:
    with pytest.raises(SpecError, match="3 words per row, but 4 codes of 4 bits take 1"):
        unpack(torch.zeros(1, 3, dtype=torch.int32), 4, 4)
    with pytest.raises(SpecError, match="int32 words"):
        unpack(torch.zeros(1, 3), 4, 24)


def test_bytes_of_any_strides() -> None:
    single = torch.zeros(1, 16, dtype=torch.float16)[:, 3:4].transpose(0, 1)  # one number, with the stride of its row
    assert single.stride() == (1, 16)
    assert as_bytes(single).tolist() == [0, 0]
    assert as_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.int16).T).tolist() == [1, 0, 3, 0, 2, 0, 4, 0]
    assert as_bytes(torch.empty(0, 3)).tolist() == []
