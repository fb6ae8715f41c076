"""Run a decoder program on CUDA: a step is one function on static memory, which a CUDA graph can capture.

Rows are (token, position, slot) as in the CPU decoder; a prompt is many rows of one slot. Per layer, a step computes queries,
keys and values in one product; rotation and append; attention; the output product; residual and norm; gate and up in one
product that also applies ``activation(gate) * up`` (if quantized; float weights need one more kernel); the down product;
residual and norm. The host is not needed during a step, so decoding replays a captured step:
:class:`~quantkit.kernels.cuda.graph.GraphDecoder` does that for a few sequences from beginning to end, and
:class:`~quantkit.engine.cuda.CudaBackend` for the engine.

:func:`rejects` names what is not supported: heads with other than 64 or 128 channels, head norms other than an RMS norm per
head, experts with float weights or biases, quantized embedding tables, rotary tables that depend on the length of a sequence,
and fp8 on devices without fp8 conversions.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.errors import KernelError
from quantkit.kernels.cuda import layout, norms
from quantkit.kernels.cuda import ops as cuda_ops
from quantkit.kernels.cuda.attention import HEAD_SIZES, LayerPages, Rope, Where, tile_tokens
from quantkit.kernels.cuda.linear import Product, Rounded, common_rounding
from quantkit.kernels.cuda.matmul import FP8_CAPABILITY, CudaKernel, State, unfit
from quantkit.kernels.program.definition import Attention, Experts, Layer, Linear, Mlp, Norm, Program
from quantkit.qtensor import as_grid, concatenate

INVARIANT_SPLITS: Final = 8
"""Number of thread blocks per sequence in attention where results must not depend on the batch."""
_ATTENDING_ROWS: Final = 128  # rows per call: each needs 16 float32 rows of a head per split for partial results


def rejects(program: Program) -> str | None:
    """Return why the CUDA kernels cannot run a program, or None if they can."""
    if not isinstance(program.embedding, Tensor):
        return "its embedding table is quantized"
    if program.rope_switch is not None:
        return f"its rotary tables depend on the length of a sequence (they change at {program.rope_switch} tokens)"
    for index, layer in enumerate(program.layers):
        if reason := _rejects_layer(layer):
            return f"layer {index}: {reason}"
    return _rejects_linear(program.head)


def _rejects_layer(layer: Layer) -> str | None:
    attention = layer.attention
    if attention.head_dim not in HEAD_SIZES:
        return f"heads have {attention.head_dim} channels, want one of {HEAD_SIZES}"
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None and (norm.center or norm.shift is not None or len(norm.gain) != attention.head_dim):
            return "a head norm is not an RMS norm per head"
    mlp = layer.mlp
    if isinstance(mlp, Experts):
        for which in ("up", "down"):
            linears = [_part(expert, which) for expert in mlp.experts]
            first = linears[0]
            same = all(one.weight is first.weight and one.expert == e and one.bias is None for e, one in enumerate(linears))
            if isinstance(first.weight, Tensor) or not same or len(mlp.experts[0].up) != 1:
                return "experts are not one quantized stack without biases"
    parts = () if isinstance(mlp, Experts) else (*mlp.up, mlp.down)
    return next((reason for part in (*attention.qkv, attention.out, *parts) if (reason := _rejects_linear(part))), None)


def _rejects_linear(linear: Linear) -> str | None:
    module: Any = linear.weight
    if isinstance(module, Tensor):
        return None
    if module.activation is not None and (module.activation.rotated or not CudaKernel().rounds(module.spec, module.activation)):
        return f"the inputs of a layer are rounded to {module.activation.describe()}, which these kernels cannot do"
    if module.spec.blocks is not None:
        return f"blocks {module.spec.blocks} of a GGUF file have no kernel there"
    if not module.spec.is_integer and torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        return "fp8 products need compute capability 8.9 or later"
    return unfit(module.spec, module.shape[-2:])


def _part(mlp: Mlp, which: str) -> Linear:
    return mlp.up[0] if which == "up" else mlp.down


class Prompts(NamedTuple):
    """Which rows of a step are runs of consecutive tokens, whose past attention reads once per tile.

    Attributes:
        singles: number of rows at the start that attend one by one.
        tiles: int32 (tiles, 2), which cover the other rows; see :func:`~quantkit.kernels.cuda.attention.attend_prompt`.
    """

    singles: int
    tiles: Tensor


class _Layer(NamedTuple):
    qkv: tuple[Product, ...]
    out: Product
    up: tuple[Product, ...]
    down: Product | None
    experts: tuple[layout.Fragments, layout.Fragments, Product] | None

    @property
    def mlp_rounding(self) -> str:
        """What the norm before the feed-forward network can round its output to."""
        return common_rounding(self.up)


class CudaDecoder:
    """A program prepared for the CUDA kernels.

    Args:
        program: the program to run.
        device: device to run it on.
        dtype: dtype of activations and float weights, float16 or bfloat16.
        context_tokens: longest sequence, for which rotary tables are computed; :meth:`lengthen` extends them.

    Raises:
        KernelError: the kernels cannot run the program; :func:`rejects` says why.
    """

    def __init__(
        self, program: Program, *, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16, context_tokens: int
    ) -> None:
        if reason := rejects(program):
            raise KernelError(f"{program.name}: {reason}")
        self.program, self.device, self.dtype = program, torch.device(device), dtype
        assert isinstance(program.embedding, Tensor)
        self._embedding = program.embedding.to(self.device, dtype)
        tied = isinstance(program.head.weight, Tensor) and program.head.weight is program.embedding
        self._head = Product(self._embedding, None, None, "") if tied else self._join((program.head,))[0]
        self._layers = [self._lay(layer) for layer in program.layers]
        norms = [*(layer.attention_in for layer in program.layers[1:]), program.final_norm]
        self._first_rounding, *others = (
            common_rounding(read) for read in (*(laid.qkv for laid in self._layers), (self._head,))
        )
        self._after = list(zip(norms, others, strict=True))  # the norm after each layer, and what it rounds its output to
        self._norms: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.tile_tokens = min(tile_tokens(one.attention.heads, one.attention.kv_heads) for one in program.layers)
        self.context_tokens, self._kept = 0, list[Any]()
        self.lengthen(context_tokens)

    def lengthen(self, tokens: int) -> None:
        """Make sure that the rotary tables have at least ``tokens`` positions, or as many as the model supports."""
        tokens = min(tokens, self.program.max_tokens or tokens)
        if tokens <= self.context_tokens:
            return
        tables = [rotary.tables(tokens) for rotary in self.program.rotaries]
        self._tables = [tuple(part.float().contiguous().to(self.device) for part in pair) for pair in tables]
        self._ropes = [self._rope(layer.attention) for layer in self.program.layers]
        self._kept.append(self._tables)  # captured steps keep reading the tables that they were captured with
        self.context_tokens = tokens

    def pages(self, pages: int, kind: str = "float", device: torch.device | str | None = None) -> list[LayerPages]:
        """Allocate pages for every layer.

        Args:
            pages: number of pages.
            kind: one of :data:`quantkit.kernels.cuda.attention.KINDS`.
            device: device of the pages; None for the decoder's.
        """
        sizes = [(layer.attention.kv_heads, layer.attention.head_dim) for layer in self.program.layers]
        return [LayerPages.empty(pages, heads, size, kind, self.dtype, device or self.device) for heads, size in sizes]

    def step(
        self,
        tokens: Tensor,
        where: Where,
        pages: Sequence[LayerPages],
        logit_rows: Tensor | None = None,
        prompts: Prompts | None = None,
        *,
        batch_invariant: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run rows, write their keys and values, and return their logits.

        Args:
            tokens: int64 or int32 (rows,).
            where: places of the rows; earlier positions of a slot were run before, or are rows of this step.
            pages: pages of every layer.
            logit_rows: int64, rows whose logits are returned; None for all.
            prompts: rows that are runs of consecutive tokens; None for none, then all rows attend one by one.
            batch_invariant: make a row's logits bitwise independent of the other rows, which is slower. Not guaranteed with
                ``prompts``.

        Returns:
            Logits (R, V) in :attr:`dtype`, and the largest logit of every 64 for the operator ``next_tokens`` (int32 (R, tiles,
            2)) if the head computed them, else None.
        """
        program, invariant = self.program, batch_invariant
        x = F.embedding(tokens, self._embedding)
        if program.embedding_scale != 1:
            x = x * program.embedding_scale
        layers, splits = program.layers, INVARIANT_SPLITS if invariant else None
        inner = self._add(x, None, layers[0].attention_in, 1.0, self._first_rounding)[1]
        for layer, laid, rope, stored, (norm, next_rounding) in zip(
            layers, self._layers, self._ropes, pages, self._after, strict=True
        ):
            q = self._append(layer.attention, self._side_by_side(laid.qkv, inner, invariant), rope, where, stored)
            a = laid.out(_read(layer.attention, q, where, stored, splits, prompts).flatten(1), self.dtype, invariant)
            a = self._normalize(a, layer.attention_out)
            read = self._add(x, None, layer.mlp_in, 1.0, laid.mlp_rounding)[1] if layer.parallel else None
            h, inner = self._add(a, x, None if layer.parallel else layer.mlp_in, layer.attention_scale, laid.mlp_rounding)
            m = self._mix(layer.mlp, laid, inner if read is None else read, invariant)
            x, inner = self._add(self._normalize(m, layer.mlp_out), h, norm, layer.mlp_scale, next_rounding)
        if logit_rows is not None:
            inner = inner.part(logit_rows) if isinstance(inner, Rounded) else inner[logit_rows]
        return self._read_out(inner, invariant)

    def _read_out(self, x: Tensor | Rounded, invariant: bool) -> tuple[Tensor, Tensor | None]:
        head, scale, cap = self._head, self.program.logit_scale, self.program.logit_softcap
        few = isinstance(x, Tensor) and len(x) <= cuda_ops.SURE_CODES_ROWS
        if few and head.weight is not None and head.form == "codes" and scale == 1 and cap is None:
            logits, bests = cuda_ops.ops().head_matmul(x, *head.weight, head.bias, head.form)
            return logits, bests
        logits = head(x, self.dtype, invariant)
        if scale != 1:
            logits = logits * scale
        return logits if cap is None else (cap * torch.tanh(logits.float() / cap)).to(logits.dtype), None

    def _append(self, attention: Attention, qkv: Tensor, rope: Rope, where: Where, pages: LayerPages) -> Tensor:
        """Write keys and values to the pages and return the queries."""
        queries: Tensor = cuda_ops.ops().append_pages(qkv, attention.heads, *rope, *where, *pages)
        return queries

    def _mix(self, mlp: Mlp | Experts, laid: _Layer, x: Tensor | Rounded, invariant: bool) -> Tensor:
        ops = cuda_ops.ops()
        if isinstance(mlp, Mlp):
            assert laid.down is not None
            inner = self._side_by_side(laid.up, x, invariant)
            if laid.up[0].activation is None:
                inner = ops.gated_activation(inner, mlp.activation, mlp.gated)
            return laid.down(inner, self.dtype, invariant)
        assert laid.experts is not None
        assert isinstance(x, Tensor)
        up, down, router = laid.experts
        weights, chosen = router(x, self.dtype, invariant).float().softmax(-1).topk(mlp.top_k, -1)
        if mlp.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        flat, order = chosen.flatten().sort(stable=True)
        offsets = torch.searchsorted(flat, torch.arange(len(mlp.experts) + 1, device=x.device)).to(torch.int32)
        first = mlp.experts[0]
        inner = ops.fragment_experts(x[order // mlp.top_k], offsets, *up, first.activation if first.gated else None)
        if not first.gated:
            inner = ops.gated_activation(inner, first.activation, False)
        y = ops.fragment_experts(inner, offsets, *down, None)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        parts = y[back].view(len(x), mlp.top_k, -1).float() * (weights * mlp.scale)[..., None]
        summed: Tensor = parts.sum(1)
        return summed.to(x.dtype)

    def _side_by_side(self, products: tuple[Product, ...], x: Tensor | Rounded, invariant: bool) -> Tensor:
        parts = [product(x, self.dtype, invariant) for product in products]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _normalize(self, x: Tensor, norm: Norm | None) -> Tensor:
        if norm is None:
            return x
        y = self._add(x, None, norm, 1.0)[1]
        assert isinstance(y, Tensor)
        return y

    def _add(
        self, x: Tensor, residual: Tensor | None, norm: Norm | None, factor: float, rounding: str = "float"
    ) -> tuple[Tensor, Tensor | Rounded]:
        """Return ``residual + factor * x``, and its norm rounded to what the next product needs."""
        gain, shift = (None, None) if norm is None else self._gains(norm)
        kind = norms.NONE if norm is None else norms.LAYER if norm.center else norms.RMS
        eps = 0.0 if norm is None else norm.eps
        total, y, scales = cuda_ops.ops().residual_norm(x, residual, gain, shift, kind, eps, factor, rounding)
        return total, y if rounding == "float" else Rounded(y, scales)

    def _gains(self, norm: Norm) -> tuple[Tensor, Tensor | None]:
        if id(norm) not in self._norms:  # the program keeps its norms alive
            shift = None if norm.shift is None else norm.shift.float().to(self.device)
            self._norms[id(norm)] = norm.gain.float().to(self.device), shift
        return self._norms[id(norm)]

    def _rope(self, attention: Attention) -> Rope:
        gains = [None if n is None else n.gain.float().to(self.device) for n in (attention.q_norm, attention.k_norm)]
        eps = next((n.eps for n in (attention.q_norm, attention.k_norm) if n is not None), 0.0)
        if attention.rotary is None:
            return Rope(None, None, 0, False, gains[0], gains[1], eps)
        rotary, (cos, sin) = self.program.rotaries[attention.rotary], self._tables[attention.rotary]
        return Rope(cos, sin, rotary.dim, rotary.interleaved, gains[0], gains[1], eps)

    def _lay(self, layer: Layer) -> _Layer:
        qkv, out = self._join(layer.attention.qkv), self._join((layer.attention.out,))[0]
        mlp = layer.mlp
        if isinstance(mlp, Mlp):
            return _Layer(qkv, out, self._join(mlp.up, mlp.activation if mlp.gated else None), self._join((mlp.down,))[0], None)
        up, down = (self._stack(mlp.experts[0], which) for which in ("up", "down"))
        return _Layer(qkv, out, (), None, (up, down, self._join((mlp.router,))[0]))

    def _stack(self, expert: Mlp, which: str) -> layout.Fragments:
        module: Any = _part(expert, which).weight
        return layout.prepack(module.qtensor.to(self.device), which == "up" and expert.gated)

    def _join(self, linears: Sequence[Linear], activation: str | None = None) -> tuple[Product, ...]:
        """Combine linears into one product if they have the same format, else return one product for each.

        With ``activation`` the linears are gate and up, and a combined quantized product applies the activation.
        """
        modules: list[Any] = [linear.weight for linear in linears]
        floats = [module for module in modules if isinstance(module, Tensor)]
        same = not floats and all(m.spec == modules[0].spec and m.activation == modules[0].activation for m in modules)
        if len(linears) > 1 and len(floats) != len(linears) and not (same and modules[0].spec.block[0] == 1):
            return tuple(self._join((linear,))[0] for linear in linears)
        bias = self._bias(linears)
        if floats:
            moved = [part.to(self.device, self.dtype) for part in floats]
            return (Product(moved[0] if len(moved) == 1 else torch.cat(moved), None, bias, ""),)
        first: Any = modules[0]
        form = "codes" if first.spec.is_integer else "fp8 codes"
        if first.activation is not None:
            form = "int8" if first.activation.grid.is_integer else "fp8"
        gated = activation is not None
        own = len(modules) == 1 and not gated and self.device.type == "cuda"
        if own and isinstance(state := first.prepacked(self.dtype), State):
            return (Product(None, state.weight, bias, form),)  # shared with the module
        joined = concatenate([module.qtensor.to(self.device) for module in modules])
        if gated and bias is not None:
            bias = layout.interleave_halves(bias)
        return (Product(None, layout.prepack(as_grid(joined), gated), bias, form, activation),)

    def _bias(self, linears: Sequence[Linear]) -> Tensor | None:
        if all(linear.bias is None for linear in linears):
            return None
        parts = [torch.zeros(one.shape[0]) if one.bias is None else one.bias.detach() for one in linears]
        return torch.cat([part.to(self.device, self.dtype) for part in parts])


def _read(
    attention: Attention, q: Tensor, where: Where, pages: LayerPages, splits: int | None, prompts: Prompts | None
) -> Tensor:
    """Return the attention of queries (rows, heads, head)."""
    ops, options = cuda_ops.ops(), (attention.scale, attention.window, attention.softcap)
    if prompts is None:
        pieces = []
        for start in range(0, len(q), _ATTENDING_ROWS):
            rows = slice(start, start + _ATTENDING_ROWS)
            here = Where(where.positions[rows], where.slots[rows], where.table)
            pieces.append(ops.attend_pages(q[rows], *here, *pages, *options, splits))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    read: Tensor = ops.attend_prompt_pages(q, *where, *pages, prompts.tiles, *options)
    if count := prompts.singles:
        first = Where(where.positions[:count], where.slots[:count], where.table)
        read[:count] = ops.attend_pages(q[:count], *first, *pages, *options, splits)
    return read
