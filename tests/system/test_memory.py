"""Pages of mapped weights: found, dropped, and unharmed."""

import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit.system.memory import available_bytes, drop_pages, mapped_pages, return_freed_memory

MIB = 1 << 20


def resident_file_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what is mapped")
def test_dropped_pages_leave_memory_and_come_back_unchanged(tmp_path):
    original = torch.arange(8 * MIB, dtype=torch.float32)
    save_file({"small": torch.ones(3), "weight": original}, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        weight = file.get_tensor("weight")
    assert torch.equal(weight, original)
    pages = mapped_pages([weight])
    assert 0 <= weight.nbytes - sum(last - first for first, last in pages) < 3 * 65536
    before = resident_file_bytes()
    drop_pages(pages)
    assert before - resident_file_bytes() > 0.9 * weight.nbytes
    assert torch.equal(weight, original)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what is mapped")
def test_a_change_to_a_mapped_weight_survives(tmp_path):
    save_file({"weight": torch.zeros(MIB)}, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        weight = file.get_tensor("weight")
    weight.add_(1)
    drop_pages(mapped_pages([weight]))
    assert bool((weight == 1).all())


def test_ordinary_memory_and_meta_are_left_alone():
    assert mapped_pages([torch.zeros(MIB), torch.empty(MIB, device="meta"), torch.empty(0)]) == []
    return_freed_memory()


def test_what_caches_would_give_back_is_available(tmp_path):
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 24000 kB\nMemFree: 200 kB\nMemAvailable:   15000 kB\n")
    assert available_bytes(str(info)) == 15000 * 1024
    assert (available_bytes(str(tmp_path / "none")) or 1) > 0
