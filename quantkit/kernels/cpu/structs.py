"""A decoder program as the plain structs of ``csrc/decoder.h``, with its weights in the kernels' layout.

``tests/kernels/test_structs.py`` compares size and field offsets of every struct with the C++ compiler's.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.blocks import Unpacked
from quantkit.kernels.build import DTYPE_CODES
from quantkit.kernels.cpu import layout
from quantkit.kernels.cpu.huge_pages import Arena
from quantkit.kernels.cpu.matmul import State
from quantkit.kernels.cpu.tables import inputs_struct
from quantkit.kernels.program.definition import Attention, Experts, Layer, Linear, Mlp, Norm, Program
from quantkit.kernels.program.reference import ACTIVATIONS

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def _struct(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _all(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for name in names.split())


# The structs of decoder.h, field by field.
NormStruct = _struct("NormStruct", *_all(_POINTER, "gain shift"), ("width", _LONG), ("eps", _FLOAT), ("center", _INT))
AttentionStruct = _struct(
    "AttentionStruct",
    ("qkv", _POINTER),
    ("qkv_count", _LONG),
    ("out", _POINTER),
    *_all(NormStruct, "q_norm k_norm"),
    *_all(_LONG, "heads kv_heads head_dim value_dim rotary window chunk"),
    *_all(_POINTER, "sinks slopes"),
    *_all(_FLOAT, "scale softcap"),
)
MlpStruct = _struct("MlpStruct", ("up", _POINTER), ("up_count", _LONG), ("down", _POINTER), *_all(_INT, "activation gated"))
LayerStruct = _struct(
    "LayerStruct",
    ("attention", AttentionStruct),
    *_all(NormStruct, "attention_in attention_out mlp_in mlp_out"),
    ("mlps", _POINTER),
    ("experts", _LONG),
    ("router", _POINTER),
    ("top_k", _LONG),
    *_all(_FLOAT, "attention_scale mlp_scale expert_scale"),
    *_all(_INT, "normalize parallel"),
)
RotaryStruct = _struct("RotaryStruct", *_all(_POINTER, "cos sin"), *_all(_LONG, "length dim"), ("interleaved", _INT))
ProgramStruct = _struct(
    "ProgramStruct",
    ("embedding", _POINTER),
    ("hidden", _LONG),
    ("layers", _POINTER),
    ("layer_count", _LONG),
    *_all(_POINTER, "rotaries head"),
    ("final_norm", NormStruct),
    *_all(_FLOAT, "embedding_scale logit_scale logit_softcap"),
    ("embedding_dtype", _INT),
)
KvStruct = _struct(
    "KvStruct", *_all(_POINTER, "keys values key_scales value_scales block_table"), ("table_stride", _LONG), ("kind", _INT)
)
BatchStruct = _struct(
    "BatchStruct",
    ("rows", _LONG),
    *_all(_POINTER, "tokens positions slots logit_rows"),
    *_all(_LONG, "logit_count vocabulary"),
    *_all(_POINTER, "logits argmax"),
    ("chunks", _LONG),
    *_all(_INT, "rounding activation_block draft"),
)


class LaidOut:
    """A program's structs, together with all memory that they point to.

    Attributes:
        struct: the ``qk::Program``. Its rotary tables are set by :meth:`lengthen`.
    """

    one_by_one = False

    def __init__(self, program: Program) -> None:
        self._program = program
        self._kept: list[Any] = []
        self._arena = Arena()
        self.struct = self._describe()

    @property
    def weights(self) -> list[layout.Prepacked]:
        """All weights in the kernels' layout."""
        return [value for value in self._kept if isinstance(value, layout.Prepacked)]

    def bytes(self, library: Any, *sizes: int) -> int:
        """Return the bytes of scratch memory for rows, chunks, columns of an activation block and threads."""
        return int(library.qk_decoder_bytes(ctypes.addressof(self.struct), *sizes))

    def run(self, library: Any, batch: Any, kv: Any, memory: int, threads: int) -> None:
        """Run one call."""
        parts = (ctypes.addressof(self.struct), ctypes.addressof(batch), ctypes.addressof(kv.struct))
        library.qk_decoder_run(*parts, memory, threads)

    def look_up(self, tokens: Any) -> Any:
        """Look up the rows of a quantized embedding; return what the native code takes for tokens then."""
        if isinstance(self._program.embedding, Tensor):
            return tokens
        self._rows = self._program.rows(torch.from_numpy(tokens).long())
        self.struct.embedding = self._rows.data_ptr()
        return np.arange(len(tokens), dtype=np.int32)

    def lengthen(self, size: int) -> None:
        """Compute the rotary tables for ``size`` positions."""
        rotaries = self._program.rotaries
        array = (RotaryStruct * max(len(rotaries), 1))()
        self._tables = [rotary.tables(size) for rotary in rotaries]
        for struct, rotary, (cos, sin) in zip(array, rotaries, self._tables, strict=False):
            struct.cos, struct.sin = cos.data_ptr(), sin.data_ptr()
            struct.length, struct.dim, struct.interleaved = size, rotary.dim, rotary.interleaved
        self._rotaries = array
        self.struct.rotaries = ctypes.addressof(array)

    def _describe(self) -> Any:
        program = self._program
        layers = self._keep(_array(LayerStruct, [self._layer(layer) for layer in program.layers]))
        table = (
            program.embedding if isinstance(program.embedding, Tensor) else torch.empty(0)
        )  # a quantized table is looked up outside, for every step
        embedding = self._keep(table.contiguous())
        return ProgramStruct(
            embedding.data_ptr(),
            program.hidden,
            ctypes.addressof(layers),
            len(program.layers),
            None,
            self._linears((program.head,)),
            self._norm(program.final_norm, program.hidden),
            program.embedding_scale,
            program.logit_scale,
            program.logit_softcap or 0.0,
            DTYPE_CODES[embedding.dtype],
        )

    def _layer(self, layer: Layer) -> Any:
        hidden = self._program.hidden
        norms = (layer.attention_in, layer.attention_out, layer.mlp_in, layer.mlp_out)
        moe = layer.mlp if isinstance(layer.mlp, Experts) else None
        mlps = _array(MlpStruct, [self._mlp(mlp) for mlp in (moe.experts if moe else (layer.mlp,))])  # type: ignore[arg-type]
        return LayerStruct(
            self._attention(layer.attention),
            *(self._norm(norm, hidden) for norm in norms),
            ctypes.addressof(self._keep(mlps)),
            len(moe.experts) if moe else 0,
            self._linears((moe.router,)) if moe else None,
            moe.top_k if moe else 0,
            layer.attention_scale,
            layer.mlp_scale,
            moe.scale if moe else 1.0,
            moe.normalize if moe else 0,
            layer.parallel,
        )

    def _attention(self, attention: Attention) -> Any:
        size = attention.head_dim
        return AttentionStruct(
            self._linears(attention.qkv),
            len(attention.qkv),
            self._linears((attention.out,)),
            self._norm(attention.q_norm, size),
            self._norm(attention.k_norm, size),
            attention.heads,
            attention.kv_heads,
            size,
            size,
            -1 if attention.rotary is None else attention.rotary,
            attention.window or 0,
            0,
            None,
            None,
            attention.scale,
            attention.softcap or 0.0,
        )

    def _mlp(self, mlp: Mlp) -> Any:
        activation = list(ACTIVATIONS).index(mlp.activation)
        return MlpStruct(self._linears(mlp.up), len(mlp.up), self._linears((mlp.down,)), activation, mlp.gated)

    def _norm(self, norm: Norm | None, width: int) -> Any:
        if norm is None:
            return NormStruct(None, None, width, 0.0, 0)
        gain = self._keep(norm.gain.contiguous())
        shift = None if norm.shift is None else self._keep(norm.shift.contiguous()).data_ptr()
        return NormStruct(gain.data_ptr(), shift, len(gain), norm.eps, norm.center)

    def _linears(self, linears: tuple[Linear, ...]) -> int:
        return ctypes.addressof(self._keep(_array(layout.LinearStruct, linear_structs(linears, self._arena, self._keep))))

    def _keep(self, value: Any) -> Any:
        self._kept.append(value)
        return value


def _array(kind: Any, items: Sequence[Any]) -> Any:
    return (kind * len(items))(*items)


def linear_structs(linears: Sequence[Linear], arena: Arena, keep: Callable[[Any], Any]) -> list[Any]:
    """Return the C views of linears that share their input; ``keep`` is given all that they point to."""
    structs = []
    for linear in linears:
        bias = None if linear.bias is None else keep(linear.bias.detach().float().contiguous())
        inputs, weight = None, linear.weight
        activation: Any = None if isinstance(weight, Tensor) else weight.activation
        if activation is not None:
            module: Any = weight
            inputs, mixing = inputs_struct(activation, linear.shape[1], module.input_scale(linear.expert or 0))
            keep((inputs, mixing))
        structs.append(keep(prepacked(linear, arena)).struct(bias, inputs))
    return structs


def prepacked(linear: Linear, arena: Arena) -> layout.Prepacked:
    """Return a linear's weight in the kernels' layout, shared with the quantized module if that uses the same layout."""
    weight: Any = linear.weight
    if isinstance(weight, Tensor):
        own = weight if weight.dtype in (torch.float32, torch.bfloat16) else weight.float()
        return layout.prepack_float(own, arena.empty)
    state = weight.prepacked(torch.float32, linear.expert or 0)
    if isinstance(state, State):
        return state.weight
    if isinstance(state, Unpacked):
        return layout.prepack_float(state.weight, arena.empty)
    return layout.prepack(weight.qtensor if linear.expert is None else weight.qtensor[linear.expert]).moved(arena.copy)
