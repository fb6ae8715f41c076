"""``openvino``: OpenVINO's IR, made by OpenVINO's own API from the ONNX graph, with 4 and 8-bit weights kept in their width.

The checkpoint is put into format ``onnx`` first, number for number. OpenVINO reads its graph, with attention in operators of
ONNX alone, since its IR has no ``GroupQueryAttention``, folds nothing of the codes, and saves ``openvino_model.xml`` and
``.bin``. Inputs and outputs are those of the graph (:mod:`quantkit.formats.onnx.graph`), keys and values among them. Tokenizer
and configs go along.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from quantkit import checkpoint
from quantkit.checkpoint.record import RECORD
from quantkit.errors import FormatError
from quantkit.exports.base import TARGETS, compare
from quantkit.formats.containers.directory import places_of
from quantkit.formats.onnx.container import STEM
from quantkit.formats.onnx.graph import graph_of
from quantkit.pipeline.reformat import reformat
from quantkit.system.files import read_json

_MODEL = "openvino_model.xml"
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
"""What is compared: on its own OpenVINO may round inputs of products to 8 bits, and keys and values."""


@TARGETS.register("openvino")
def openvino(source: Path, out: Path) -> dict[str, Any]:
    """See :data:`quantkit.exports.base.Target`."""
    try:
        import openvino as ov
    except ImportError as error:
        raise FormatError(f"target openvino needs the openvino package: pip install openvino ({error})") from error
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".") as scratch:
        graph, core = Path(scratch, "onnx"), ov.Core()
        reformat(source, "onnx", graph)
        config = read_json(graph / "config.json")
        (graph / "plain.onnx").write_bytes(graph_of(config, places_of(graph, STEM), plain=True))
        model = core.read_model(graph / "plain.onnx")
        ov.save_model(model, out / _MODEL, compress_to_fp16=False)
    for file in sorted(source.glob("*.json")) + sorted(source.glob("*.jinja")):
        if file.name not in (RECORD, "genai_config.json") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    compiled = core.compile_model(out / _MODEL, "CPU", _EXACT)
    return {
        "version": ov.__version__,
        "difference": compare(_difference(compiled, source), out, f"OpenVINO {ov.__version__}"),
        "bytes": (out / _MODEL).with_suffix(".bin").stat().st_size,
    }


@torch.no_grad()
def _difference(compiled: Any, source: Path) -> float:
    """Return the relative difference of the logits of a few tokens."""
    own: Any = checkpoint.load(source, dtype=torch.float32, compute="exact", cache=False)
    ids = torch.arange(8)[None]
    feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    for one in compiled.inputs:
        if one.any_name.startswith("past_key_values"):
            shape = [1 if size.is_dynamic else size.get_length() for size in one.partial_shape]
            feed[one.any_name] = torch.zeros(1, shape[1], 0, shape[3]).numpy()
    theirs = torch.from_numpy(compiled(feed)["logits"])
    want = own(input_ids=ids).logits
    return float((theirs - want).norm() / want.norm())
