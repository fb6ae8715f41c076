"""Names of dtypes and devices, as callers write them."""

import pytest
import torch

import quantkit
from quantkit.dtypes import float_dtype
from quantkit.errors import SpecError
from quantkit.system.compute import known_device


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("bfloat16", torch.bfloat16),
        ("torch.float32", torch.float32),
        (torch.float16, torch.float16),
        ("auto", None),
        (None, None),
    ],
)
def test_a_dtype_or_its_name(given, want):
    assert float_dtype(given) is want


@pytest.mark.parametrize("given", ["bf16", "int8", torch.int8, "", 16])
def test_what_is_no_float_dtype_is_named(given):
    with pytest.raises(SpecError, match=r"dtype=.*want a float dtype of torch or its name"):
        quantkit.load("anywhere", dtype=given)


@pytest.mark.parametrize(("given", "message"), [("bfloat16", "want cpu or cuda"), ("cuda:99", "GPUs on this machine; use cpu")])
def test_what_is_no_device_here_is_named(given, message):
    with pytest.raises(SpecError, match=message):
        quantkit.load("anywhere", device=given)
    assert known_device("cpu") == torch.device("cpu")
