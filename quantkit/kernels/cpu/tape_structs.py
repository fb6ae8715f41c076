"""A tape as the plain structs of ``csrc/tape.h``, with its weights in the kernels' layout."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels.build import DTYPE_CODES
from quantkit.kernels.cpu import layout
from quantkit.kernels.cpu.huge_pages import Arena
from quantkit.kernels.cpu.stages import ROW, Stage, plan, plan_inside
from quantkit.kernels.cpu.structs import AttentionStruct, NormStruct, _all, _array, _struct, linear_structs
from quantkit.kernels.program.definition import Linear
from quantkit.kernels.program.run_tape import MAPS, ROWS
from quantkit.kernels.program.tape import (
    MOST_AXES,
    Attend,
    Compute,
    Join,
    Load,
    Lookup,
    Mixture,
    Product,
    Read,
    Step,
    Store,
    Tape,
)

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_ROW_KINDS, _JOIN, _LOOKUP, _LOAD, _STORE = 64, 96, 97, 98, 99
_KINDS = {name: number for number, name in enumerate(MAPS)} | {name: _ROW_KINDS + i for i, name in enumerate(ROWS)}

OperandStruct = _struct("OperandStruct", ("constant", _POINTER), ("offset", _LONG), ("strides", _LONG * MOST_AXES))
TapeStepStruct = _struct(
    "TapeStepStruct",
    *_all(_INT, "kind axes"),
    ("shape", _LONG * MOST_AXES),
    ("in", OperandStruct * 3),
    ("out", _LONG),
    ("out_strides", _LONG * MOST_AXES),
    *_all(_LONG, "n m"),
    ("table", _POINTER),
    ("numbers", _FLOAT * 2),
)
TapeProductsStruct = _struct("TapeProductsStruct", ("linears", _POINTER), *_all(_LONG, "count x y"))
TapeAttendStruct = _struct(
    "TapeAttendStruct", ("attention", AttentionStruct), *_all(_LONG, "q k v out cache"), *_all(_INT, "append pad")
)
TapeStepsStruct = _struct("TapeStepsStruct", ("steps", _POINTER), *_all(_LONG, "count result"))
TapeMixtureStruct = _struct(
    "TapeMixtureStruct",
    *_all(_POINTER, "up down"),
    *_all(_LONG, "experts top_k x index weights out in_width out_width"),
    *_all(TapeStepsStruct, "inner outer"),
    *_all(_LONG, "inner_width inner_input outer_input"),
)
TapeStageStruct = _struct(
    "TapeStageStruct",
    ("rows", TapeStepsStruct),
    *(pair for name in ("product", "attend", "mixture") for pair in ((f"{name}s", _POINTER), (f"{name}_count", _LONG))),
    *_all(_INT, "ordered pad"),
)
TapeStruct = _struct(
    "TapeStruct",
    ("stages", _POINTER),
    *_all(_LONG, "stage_count width hidden result"),
    ("head", _POINTER),
    *_all(_FLOAT, "logit_scale logit_softcap"),
)
TapeStatesStruct = _struct("TapeStatesStruct", *_all(_POINTER, "memory places"))


class LaidOutTape:
    """A tape's structs, together with all memory that they point to.

    Attributes:
        struct: the ``qk::Tape``.
        one_by_one: whether a call may have only one row of every sequence.
        outside: quantized tables that are looked up outside, for the tokens of a call, with the struct that reads the rows.
    """

    def __init__(self, tape: Tape) -> None:
        self._kept: list[Any] = []
        self._arena = Arena()
        self._tape, self._plan = tape, plan(tape)
        self.one_by_one = self._plan.one_by_one
        self.outside: list[tuple[Any, Any]] = []
        self._pending: list[tuple[Any, tuple[Any, int]]] = []
        stages = self._keep(_array(TapeStageStruct, [self._stage(stage) for stage in self._plan.stages]))
        for module, (array, index) in self._pending:
            self.outside.append((module, array[index]))
        self.struct = TapeStruct(
            ctypes.addressof(stages),
            len(self._plan.stages),
            self._plan.width,
            tape.head.shape[1],
            self._at(tape.body.result),
            self._linears([tape.head]),
            tape.logit_scale,
            tape.logit_softcap or 0.0,
        )

    @property
    def weights(self) -> list[layout.Prepacked]:
        """All weights in the kernels' layout."""
        return [value for value in self._kept if isinstance(value, layout.Prepacked)]

    def bytes(self, library: Any, *sizes: int) -> int:
        """Return the bytes of scratch memory for rows, chunks, columns of an activation block and threads."""
        return int(library.qk_tape_bytes(ctypes.addressof(self.struct), *sizes))

    def run(self, library: Any, batch: Any, kv: Any, memory: int, threads: int) -> None:
        """Run one call."""
        states = TapeStatesStruct(ctypes.addressof(kv.state_array), kv.places.ctypes.data)
        parts = (ctypes.addressof(part) for part in (self.struct, batch, kv.struct, states))
        library.qk_tape_run(*parts, memory, threads)

    def look_up(self, tokens: Any) -> Any:
        """Look up rows of quantized tables for the tokens of a call."""
        self._rows = [module(torch.from_numpy(tokens).long()).float().contiguous() for module, _ in self.outside]
        for (_, struct), rows in zip(self.outside, self._rows, strict=True):
            struct.table = rows.data_ptr()
        return tokens

    def lengthen(self, size: int) -> None:
        """Do nothing: a tape has no tables of positions."""

    def _stage(self, stage: Stage) -> Any:
        products = _array(TapeProductsStruct, [self._products(group) for group in stage.products])
        attends = _array(TapeAttendStruct, [self._attend(step) for step in stage.attends])
        mixtures = _array(TapeMixtureStruct, [self._mixture(step) for step in stage.mixtures])
        parts = []
        for array in (products, attends, mixtures):
            parts += [ctypes.addressof(self._keep(array)), len(array)]
        return TapeStageStruct(self._steps(stage.rows, self._plan.places, 0), *parts, stage.ordered)

    def _steps(self, steps: Sequence[Step], places: dict[int, int], result: int) -> Any:
        structs, tables = list[Any](), list[tuple[Any, int]]()
        for step in steps:
            for struct in self._step(step, places):
                if isinstance(step, Lookup) and not isinstance(step.table, Tensor):
                    tables.append((step.table, len(structs)))
                structs.append(struct)
        array = self._keep(_array(TapeStepStruct, structs))
        for table, index in tables:
            self._pending.append((table, (array, index)))
        return TapeStepsStruct(ctypes.addressof(array), len(structs), result)

    def _step(self, step: Step, places: dict[int, int]) -> list[Any]:
        if isinstance(step, Join):
            found = []
            for read, place in zip(step.reads, step.places, strict=True):
                one = self._arithmetic(_JOIN, (read,), places, places[step.out] + place.offset)
                one.out_strides = (_LONG * MOST_AXES)(*place.strides)
                found.append(one)
            return found
        if isinstance(step, Compute):
            one = self._arithmetic(_KINDS[step.op], step.reads, places, places[step.out])
            one.numbers = (_FLOAT * 2)(*step.numbers)
            if step.op == "topk":
                one.m = int(step.numbers[0])
            elif step.op in ("gather", "scatter"):
                one.m = step.reads[1].shape[-1]
            elif step.op == "contract":
                one.n = step.reads[1].shape[1]
            return [one]
        one = TapeStepStruct()
        if isinstance(step, Lookup):
            one = self._arithmetic(_LOOKUP, step.reads, places, places[step.out])
            if isinstance(step.table, Tensor):
                table = self._keep(step.table.contiguous())
                one.table, one.n, one.m = table.data_ptr(), table.shape[1], DTYPE_CODES[table.dtype]
            else:  # rows of this call, by number
                module: Any = step.table
                one.n, one.m = module.shape[1], DTYPE_CODES[torch.float32]
                getattr(one, "in")[0].offset = ROW
        elif isinstance(step, Load | Store):
            one.kind = _LOAD if isinstance(step, Load) else _STORE
            one.n, one.m = step.state, self._tape.states[step.state]
            if isinstance(step, Load):
                one.out = places[step.out]
            else:
                getattr(one, "in")[0].offset = self._at(step.reads[0])
        return [one]

    def _arithmetic(self, kind: int, reads: Sequence[Read], places: dict[int, int], out: int) -> Any:
        one = TapeStepStruct()
        one.kind, one.axes, one.out = kind, len(reads[0].shape), out
        one.shape = (_LONG * MOST_AXES)(*reads[0].shape)
        operands = getattr(one, "in")
        for operand, read in zip(operands, reads, strict=False):
            operand.strides = (_LONG * MOST_AXES)(*read.strides)
            if isinstance(read.source, Tensor):
                operand.constant, operand.offset = self._keep(read.source.contiguous()).data_ptr(), read.offset
            else:
                operand.offset = places[read.source] + read.offset
        return one

    def _products(self, group: Sequence[Product]) -> Any:
        places = self._plan.places
        return TapeProductsStruct(
            self._linears([step.linear for step in group]), len(group), self._at(group[0].reads[0]), places[group[0].out]
        )

    def _attend(self, step: Attend) -> Any:
        none = NormStruct(None, None, 0, 0.0, 0)
        extra = (None if one is None else self._keep(one.contiguous()).data_ptr() for one in (step.sinks, step.slopes))
        attention = AttentionStruct(
            None,
            0,
            None,
            none,
            none,
            step.heads,
            step.kv_heads,
            step.key_dim,
            step.value_dim,
            -1,
            step.window or 0,
            step.chunk or 0,
            *extra,
            step.scale,
            step.softcap or 0.0,
        )
        reads = [self._at(one) for one in step.reads]
        return TapeAttendStruct(attention, *reads, self._plan.places[step.out], step.cache, step.append)

    def _mixture(self, step: Mixture) -> Any:
        first, hidden = step.experts[0].up.shape[0], step.experts[0].down.shape[0]
        places, width = plan_inside(step.inner, {0: 0}, -(-first // 16) * 16)
        inner = self._steps(step.inner.steps, places, _place(step.inner.result, places))
        after = width
        outer, width = TapeStepsStruct(), after + -(-hidden // 16) * 16
        if step.outer is not None:
            places, width = plan_inside(step.outer, {0: after}, width)
            outer = self._steps(step.outer.steps, places, _place(step.outer.result, places))
        x, index, weights = (self._at(one) for one in step.reads)
        return TapeMixtureStruct(
            self._linears([expert.up for expert in step.experts]),
            self._linears([expert.down for expert in step.experts]),
            len(step.experts),
            step.reads[1].size,
            x,
            index,
            weights,
            self._plan.places[step.out],
            step.reads[0].size,
            hidden,
            inner,
            outer,
            width,
            0,
            after,
        )

    def _at(self, read: Read) -> int:
        return _place(read, self._plan.places)

    def _linears(self, linears: Sequence[Linear]) -> int:
        return ctypes.addressof(self._keep(_array(layout.LinearStruct, linear_structs(linears, self._arena, self._keep))))

    def _keep(self, value: Any) -> Any:
        self._kept.append(value)
        return value


def _place(read: Read, places: dict[int, int]) -> int:
    assert isinstance(read.source, int)
    return places[read.source] + read.offset
