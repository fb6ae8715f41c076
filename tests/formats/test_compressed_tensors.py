"""compressed-tensors: literal bytes, and what the package of that name makes of them."""

import pytest
import torch

from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS
from quantkit.formats.codecs.compressed_tensors import IntQuantized, PackQuantized
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec, Scheme

RULE = FORMATS.get("compressed-tensors")


def as_signed(*words: int) -> list[int]:
    return [w - (1 << 32) if w >= 1 << 31 else w for w in words]


def test_golden_int4() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 1)
    zero = torch.tensor([[1, 2], [10, 15]], dtype=torch.uint8)
    spec = QuantSpec("int4", (1, 8), symmetric=False)
    tensors = PackQuantized().encode(GridTensor.from_codes(codes, torch.ones(2, 2).half(), zero, spec))
    assert tensors["weight_packed"].tolist() == [as_signed(0x76543210, 0xFEDCBA98)] * 2
    assert tensors["weight_zero_point"].tolist() == [[0xA1, 0xF2]]  # row 0 in the low nibble: packed down dimension 0
    assert tensors["weight_shape"].tolist() == [2, 16]
    assert tensors["weight_scale"].tolist() == [[1, 1], [1, 1]]


def test_golden_int3_is_dense() -> None:
    codes = torch.tensor([[7, 0, 1, 2, 3, 4, 5, 6] * 2], dtype=torch.uint8)
    spec = QuantSpec("int3", (1, -1))
    tensors = PackQuantized().encode(GridTensor.from_codes(codes, torch.ones(1, 1).half(), None, spec))
    stream = sum(int(code) << (3 * i) for i, code in enumerate(codes[0].tolist()))
    assert tensors["weight_packed"].tolist() == [as_signed(stream & 0xFFFFFFFF, stream >> 32)]
    assert tensors["weight_packed"].tolist() == [as_signed(0x47D63447, 0xD634)]


def test_golden_int8() -> None:
    codes = torch.tensor([[0, 1, 128, 255]], dtype=torch.uint8)
    packed = GridTensor.from_codes(codes, torch.full((1, 1), 0.5), None, QuantSpec("int8", (1, -1), scale_dtype="float32"))
    assert PackQuantized().encode(packed)["weight_packed"].tolist() == [as_signed(0xFF800100)]
    plain = IntQuantized().encode(packed)
    assert plain["weight"].tolist() == [[-128, -127, 0, 127]]
    assert plain["weight"].dtype == torch.int8
    assert plain["weight_scale"].tolist() == [[0.5]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("block", [(1, 32), (1, -1), (-1, -1)], ids=["group", "channel", "tensor"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_package_dequantizes_to_the_same_values(bits: int, symmetric: bool, block: tuple[int, int], dtype: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    spec = QuantSpec(f"int{bits}", block, symmetric, dtype)
    scheme = Scheme(spec)
    if block == (-1, -1) and bits != 8:
        assert "per tensor" in (RULE.rejects(scheme, (24, 96)) or "")
        return
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(bits))
    scale, zero = grid.choose_qparams(weight, spec)
    qtensor = GridTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec)
    config = QuantizationConfig.model_validate(RULE.dialect.dump_config({"m": scheme}, [], dtype))
    group = config.config_groups["group_0"]
    package = BaseCompressor.get_value_from_registry(group.format or config.format)
    theirs = package.decompress(RULE.codec(scheme).encode(qtensor), group)["weight"]
    ours = qtensor.dequantize(getattr(torch, dtype))
    assert theirs.dtype == ours.dtype
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_reads_what_the_package_writes(bits: int, symmetric: bool) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    spec = QuantSpec(f"int{bits}", (1, 16), symmetric, "float32")
    weight = torch.randn(20, 48, generator=torch.Generator().manual_seed(bits))
    scale, zero = grid.choose_qparams(weight, spec)
    config = QuantizationConfig.model_validate(RULE.dialect.dump_config({"m": Scheme(spec)}, [], "float32"))
    signed = None if zero is None else (zero.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    state = {"weight": weight, "weight_scale": scale} | ({} if signed is None else {"weight_zero_point": signed})
    group = config.config_groups["group_0"]
    package = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = package.compress(state, group)
    found = PackQuantized().decode(tensors, spec, (20, 48))
    assert torch.equal(found.dequantize(), package.decompress(tensors, group)["weight"])


def padded(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack as compressed-tensors before 0.18: floor(32 / bits) codes per word."""
    per = 32 // bits
    words = []
    for start in range(0, codes.shape[1], per):
        chunk = codes[:, start : start + per].to(torch.int64)
        words.append((chunk << (torch.arange(chunk.shape[1]) * bits)).sum(1))
    return torch.stack(words, 1).to(torch.int32)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_version_decides_between_padded_and_dense(bits: int) -> None:
    spec = QuantSpec(f"int{bits}", (1, 16), symmetric=False, scale_dtype="float32")
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (20, 48), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (20, 3), generator=generator, dtype=torch.uint8)
    scale = torch.rand(20, 3, generator=generator) + 0.1
    old = {
        "weight_packed": padded(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([20, 48]),
        "weight_zero_point": padded(zero.T, bits).T.contiguous(),
    }
    config = RULE.dialect.dump_config({"m": Scheme(spec)}, [], "float32")
    found = RULE.dialect.load_config({**config, "version": "0.17.1"}, "float32", {})("m")
    assert found is not None
    qtensor = found.codec.decode(old, spec, (20, 48))
    assert torch.equal(qtensor.codes(), codes)
    assert qtensor.zero_point is not None
    assert torch.equal(qtensor.zero_point, zero)
    dense = RULE.dialect.load_config({**config, "version": "0.18.0.a20260601"}, "float32", {})("m")
    assert dense is not None
    assert dense.codec == PackQuantized(padded=False)
    with pytest.raises(FormatError, match=r"0\.18"):
        RULE.dialect.load_config({**config, "version": None}, "float32", {})


def test_scale_dtype_must_fit_the_checkpoint() -> None:
    scheme = Scheme(QuantSpec("int4", (1, 32), scale_dtype="float16"))
    assert RULE.rejects(scheme, (8, 64), "float16") is None
    assert RULE.rejects(scheme, (8, 64), "float32") is None
    assert "scale_dtype bfloat16" in (RULE.rejects(scheme, (8, 64), "bfloat16") or "")
    assert (
        RULE.dialect.dump_config({"m": scheme}, [], "float32")["config_groups"]["group_0"]["weights"]["scale_dtype"]
        == "torch.float16"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "dense24"}}, "sparsity_config"),
        ({"transform_config": {"x": 1}}, "transform_config"),
        ({"quantization_status": "frozen"}, "frozen"),
        ({"format": "nvfp4-pack-quantized", "group_format": None}, "nvfp4"),
        ({"weights": {"type": "float"}}, "float"),
        ({"weights": {"strategy": "block"}}, "block"),
        ({"weights": {"group_size": 0}}, "group_size is 0"),
        ({"weights": {"group_size": "64"}}, "group_size is '64'"),
        ({"weights": {"num_bits": 1}}, "int1"),
        ({"weights": {"actorder": "group"}}, "g_idx"),
        ({"input_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": False}}, "input_activations"),
        ({"targets": ["re:("]}, "malformed"),
    ],
)
def test_foreign_configs_that_cannot_be_exact_are_refused(change: dict, message: str) -> None:
    config = RULE.dialect.dump_config({"m": Scheme(QuantSpec("int4", (1, 32)))}, [], "float16")
    group = config["config_groups"]["group_0"]
    for key, value in change.items():
        if key == "weights":
            group["weights"].update(value)
        elif key == "group_format":
            group["format"] = value
        elif key in ("input_activations", "targets"):
            group[key] = value
        else:
            config[key] = value
    with pytest.raises(FormatError, match=message):
        RULE.dialect.load_config(config, "float16", {})("m")


def test_targets_ignore_and_order() -> None:
    config = RULE.dialect.dump_config({"m": Scheme(QuantSpec("int4", (1, 32)))}, ["re:.*gate$", "lm_head"], "float16")
    group = config["config_groups"]["group_0"]
    eight = {**group, "targets": ["re:.*down_proj$"], "weights": {**group["weights"], "num_bits": 8}}
    config["config_groups"] = {"group_0": eight, "group_1": {**group, "targets": ["Linear"]}}
    match = RULE.dialect.load_config(config, "float16", {})
    found = {name: match(name) for name in ("a.gate", "lm_head", "a.down_proj", "a.up_proj")}
    assert {name: stored and stored.scheme.weight.bits for name, stored in found.items()} == {
        "a.gate": None,
        "lm_head": None,
        "a.down_proj": 8,
        "a.up_proj": 4,
    }


def test_permuted_shape_tensor_is_refused() -> None:
    spec = QuantSpec("int4", (1, 8))
    codec = PackQuantized()
    tensors = codec.encode(GridTensor.from_codes(torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 2).half(), None, spec))
    tensors["weight_shape"] = torch.tensor([16, 8])
    with pytest.raises(FormatError, match="weight_shape"):
        codec.decode(tensors, spec, (8, 16))
