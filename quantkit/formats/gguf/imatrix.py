"""An importance matrix for ``llama-quantize --imatrix``: the squares of every input channel, summed, and how many there were.

It is a GGUF file of type ``imatrix`` (llama.cpp's ``common/imatrix-loader.cpp``): per weight a tensor ``NAME.in_sum2`` float32
(experts, in) and one ``NAME.counts`` float32 (experts, 1); a weight without experts has one row.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantkit.formats.gguf.file import package
from quantkit.system.files import atomic_path, clear_errors


def write_imatrix(path: Path, sums: Mapping[str, tuple[Tensor, Tensor]], *, windows: int, length: int, source: str) -> None:
    """Write the file, whole or not at all.

    Args:
        path: where; replaced if it is there.
        sums: name in a GGUF file to sums of squares (experts, in) and numbers of tokens (experts,).
        windows: how many pieces of text there were.
        length: tokens of each.
        source: name of the text.

    Raises:
        FormatError: the gguf package is not there.
        DiskError: the disk is full or refuses.
    """
    gguf = package()
    with clear_errors(f"write {path}"), atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [source])
        writer.add_uint32("imatrix.chunk_count", windows)
        writer.add_uint32("imatrix.chunk_size", length)
        for name, (total, count) in sums.items():
            writer.add_tensor(f"{name}.in_sum2", total.to(torch.float32).contiguous().numpy())
            writer.add_tensor(f"{name}.counts", count.to(torch.float32).unsqueeze(-1).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
