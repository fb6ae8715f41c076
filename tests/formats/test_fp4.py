"""NVFP4 and MXFP4 in compressed-tensors: literal bytes, and what the package of that name makes of them and writes itself."""

import pytest
import torch

from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS
from quantkit.numerics import grid
from quantkit.presets import preset
from quantkit.qtensor import GridTensor
from quantkit.quantizers.base import quantize_site
from quantkit.quantizers.rtn import RTN
from quantkit.spec import QuantSpec, Scheme

RULE = FORMATS.get("compressed-tensors")
NVFP4, MXFP4 = (preset(name, ()).weight for name in ("nvfp4", "mxfp4"))
BOTH = pytest.mark.parametrize("spec", [NVFP4, MXFP4], ids=["nvfp4", "mxfp4"])


def package_of(spec: QuantSpec, dtype: str = "float32"):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(RULE.dialect.dump_config({"m": Scheme(spec)}, [], dtype))
    group = config.config_groups["group_0"]
    return BaseCompressor.get_value_from_registry(group.format or config.format), group


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(24, 96, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 2, 24).unsqueeze(-1)


def test_golden_nvfp4() -> None:
    values = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 0.0]])
    one = quantize_site(RTN(), "s", torch.cat([values, values / 448], 1), NVFP4, None).qtensor
    tensors = RULE.codec(Scheme(NVFP4)).encode(one)
    nibbles = [0x10, 0x32, 0x54, 0x76, 0xA9, 0xCB, 0xED, 0x0F]  # even column low
    assert tensors["weight_packed"].tolist() == [nibbles * 2]
    assert tensors["weight_scale"].view(torch.uint8).tolist() == [[0x7E, 0x38]]  # 448 and 1 as e4m3
    assert tensors["weight_global_scale"].tolist() == [448.0]  # 448 * 6 / 6
    assert torch.allclose(one.dequantize()[:, :16], values, rtol=1e-6, atol=0)


def test_golden_mxfp4() -> None:
    values = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0] * 4])
    tensors = RULE.codec(Scheme(MXFP4)).encode(quantize_site(RTN(), "s", values * 8, MXFP4, None).qtensor)
    assert tensors["weight_packed"].tolist() == [[0x10, 0x32, 0x54, 0x76] * 4]
    assert tensors["weight_scale"].tolist() == [[127 + 3]]
    assert tensors["weight_scale"].dtype == torch.uint8
    assert "weight_global_scale" not in tensors


@BOTH
def test_the_package_dequantizes_to_the_same_values(spec: QuantSpec) -> None:
    package, group = package_of(spec)
    qtensor = quantize_site(RTN(), "s", weight(), spec, None).qtensor
    tensors = RULE.codec(Scheme(spec)).encode(qtensor)
    assert set(tensors) == set(package.compression_param_names(group))
    theirs = package.decompress(tensors, group)["weight"]
    assert torch.equal(theirs, qtensor.dequantize(theirs.dtype))


@BOTH
def test_reads_what_the_package_writes(spec: QuantSpec) -> None:
    package, group = package_of(spec)
    source = weight(1)
    qtensor = quantize_site(RTN(), "s", source, spec, None).qtensor
    state = {"weight": source, "weight_scale": qtensor.scale.float()}
    if spec.has_global_scale:
        state["weight_global_scale"] = qtensor.global_scale * 0.75  # another writer's choice, and no power of two
    tensors = package.compress(state, group)
    found = RULE.codec(Scheme(spec)).decode(tensors, spec, (24, 96))
    theirs = package.decompress(tensors, group)["weight"]
    assert torch.equal(found.dequantize(theirs.dtype), theirs)


@BOTH
def test_config_comes_back_and_mismatches_are_refused(spec: QuantSpec) -> None:
    config = RULE.dialect.dump_config({"m": Scheme(spec)}, [], "bfloat16")
    found = RULE.dialect.load_config(config, "bfloat16", {})("m")
    assert found is not None
    assert found.scheme == Scheme(spec)
    assert RULE.rejects(Scheme(spec), (24, 96), "bfloat16") is None
    other = "mxfp4" if spec == NVFP4 else "nvfp4"
    config["config_groups"]["group_0"]["format"] = f"{other}-pack-quantized"
    with pytest.raises(FormatError, match="config_groups"):
        RULE.dialect.load_config(config, "bfloat16", {})
    with pytest.raises(FormatError, match="nvfp4 or mxfp4"):
        RULE.codec(Scheme(spec)).layout(QuantSpec("int4"), (8, 32))


def test_a_global_scale_makes_room_for_every_size_of_weight() -> None:
    for size in (1e-6, 1.0, 1e6):
        source = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)) * size
        assert quantize_site(RTN(), "s", source, NVFP4, None).loss < 0.012
    zeros = quantize_site(RTN(), "s", torch.zeros(2, 16), NVFP4, None).qtensor
    assert torch.equal(zeros.dequantize(), torch.zeros(2, 16))


def test_round_scale_saturates_in_fp8() -> None:
    stored = grid.round_scale(torch.tensor([0.0, 1e-9, 1.0, 1e9]), "float8_e4m3fn").float()
    assert stored.tolist() == [2.0**-9, 2.0**-9, 1.0, 448.0]


def test_global_scales_join_only_if_they_are_the_same() -> None:
    from quantkit.errors import SpecError
    from quantkit.qtensor import concatenate

    one, other = (quantize_site(RTN(), "s", weight(seed), NVFP4, None).qtensor for seed in (0, 1))
    assert torch.equal(GridTensor.stack([one, other])[1].dequantize(), other.dequantize())
    assert torch.equal(concatenate([one.rows(slice(0, 8)), one.rows(slice(8, 24))]).dequantize(), one.dequantize())
    with pytest.raises(SpecError, match="global_scale"):
        concatenate([one, other])
    with pytest.raises(SpecError, match="global_scale"):
        GridTensor(one.packed, one.scale, None, NVFP4, one.shape)
