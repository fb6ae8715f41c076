"""Inputs and weights that meet in the same basis, and the scale that calibration finds for inputs."""

import pytest
import torch

from quantkit.numerics.fake import fake_quantize
from quantkit.numerics.hadamard import hadamard_transform
from quantkit.numerics.inputs import UNCHANGED, InputQuantizer, static_scale
from quantkit.presets import preset
from quantkit.spec import TOKEN_INT8, ActivationSpec, QuantSpec

STATIC = ActivationSpec(QuantSpec("int8", (-1, -1)), dynamic=False)


def test_inputs_that_are_left_alone_are_the_same_tensor() -> None:
    x = torch.randn(3, 8)
    assert UNCHANGED(x) is x
    assert UNCHANGED.prepare_weight(x) is x
    assert UNCHANGED.restore_weight(x) is x


@pytest.mark.parametrize("rotated", [False, True])
def test_prepared_inputs_meet_the_prepared_weight(rotated: bool) -> None:
    quantizer = InputQuantizer(preset("w8a8-rotated" if rotated else "w8a8", ()).activation)
    assert quantizer.rotated == rotated
    x, weight = torch.randn(5, 96), torch.randn(24, 96)
    stored = quantizer.prepare_weight(weight)
    torch.testing.assert_close(quantizer.prepare_input(x) @ stored.T, x @ weight.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantizer.restore_weight(stored), weight)
    assert torch.equal(quantizer(x), fake_quantize(hadamard_transform(x) if rotated else x, TOKEN_INT8.grid))
    assert torch.equal(quantizer.round(quantizer.prepare_input(x)), quantizer(x))
    assert (quantizer(x) @ stored.T - x @ weight.T).norm() < 0.02 * (x @ weight.T).norm()


def test_a_static_scale_covers_what_calibration_saw() -> None:
    largest = torch.tensor([[1.0, 51.0, 3.0], [0.0, 0.0, 0.0]])  # the second expert saw no input
    scale = static_scale(STATIC, largest)
    assert scale.shape == (2, 1)
    torch.testing.assert_close(scale.float(), torch.full((2, 1), 51 / 127.5), rtol=1e-3, atol=0)
    x = torch.tensor([[51.0, -100.0, 0.1]])
    rounded = InputQuantizer(STATIC, scale[0])(x)
    assert rounded[0].tolist() == pytest.approx([50.8, -51.2, 0.0], rel=1e-3)
