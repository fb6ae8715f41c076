"""The graph of a decoder in ONNX, with its keys and values as inputs and outputs, as onnxruntime-genai and optimum name them.

    input_ids int64 (batch, sequence)       attention_mask int64 (batch, past + sequence), ones
    past_key_values.N.key, .value float32 (batch, key/value heads, past, channels)      position_ids are not needed
    -> logits float32 (batch, sequence, vocabulary), present.N.key, .value (batch, key/value heads, past + sequence, channels)

Beside operators of ONNX there are those of ONNX Runtime (``com.microsoft``): ``GroupQueryAttention``, which rotates, keeps
and attends, ``MatMulNBits`` for quantized weights, ``FusedMatMul`` for float ones, and ``SimplifiedLayerNormalization`` (RMS).
Everything is computed in float32; weights in half precision are widened by a ``Cast`` that ONNX Runtime carries out once.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.formats import decoder
from quantkit.formats.containers.directory import Place
from quantkit.formats.onnx import attention

FAMILIES: Final[dict[str, Mapping[str, tuple[Any, ...]]]] = {
    "llama": decoder.SILU,
    "mistral": decoder.SILU,
    "qwen2": decoder.SILU,
    "qwen3": decoder.SILU,
}
"""Kinds of models that are written, by ``model_type``, with the values that keys of their config must have."""

_ROTARY: Final = ("default", "linear", "llama3")
_OPSET, _IR, _CONTRIB = 21, 10, "com.microsoft"
_LAYER: Final = frozenset(
    [
        *("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        *(f"self_attn.{part}_proj.{what}" for part in "qkvo" for what in ("weight", "bias")),
        *(f"mlp.{part}_proj.{what}" for part in ("gate", "up", "down") for what in ("weight", "bias")),
    ]
)
_ENDS: Final = frozenset(["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])


def package() -> Any:
    """Return the onnx package.

    Raises:
        FormatError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise FormatError(f"format onnx needs the onnx package: pip install 'quantkit[onnx]' ({error})") from error
    return onnx


def refuse_model(config: Mapping[str, Any], names: Iterable[str], tokenizer: Mapping[str, Any] | None) -> str | None:
    """Say why a whole model cannot be written; None if it can.

    Args:
        config: what config.json says.
        names: of all its tensors, before any is quantized.
        tokenizer: not asked; readers have their own.
    """
    try:
        package()
        _check(config)
        for name in names:
            layer = name.split(".", 3)
            known = name in _ENDS or (name.startswith("model.layers.") and len(layer) == 4 and layer[3] in _LAYER)
            if not known:
                raise FormatError(f"{name}: the graph has no place for it in a {config.get('model_type')} model; use native")
    except FormatError as error:
        return str(error)
    return None


def _check(config: Mapping[str, Any]) -> None:
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise FormatError(f"an ONNX graph of a {kind} model is not written, only of {', '.join(FAMILIES)}; use another format")
    window = ("sliding_window",) if kind == "mistral" else ()
    decoder.refuse_unknown(config, FAMILIES[kind], window, _ROTARY, reader="this graph")
    if decoder.head_size(config) % 16:
        raise FormatError(f"heads of {decoder.head_size(config)} channels: GroupQueryAttention rotates multiples of 16")


def graph_of(config: Mapping[str, Any], places: Mapping[str, Place], *, plain: bool = False) -> bytes:
    """Return ``model.onnx``.

    Args:
        config: what config.json says, with ``quantization_config``.
        places: where the data of every tensor of the checkpoint are.
        plain: attention in operators of ONNX alone (:mod:`.attention`).

    Raises:
        FormatError: see :func:`refuse_model`.
    """
    _check(config)
    graph = _Graph(places, config["quantization_config"])
    layers = int(config["num_hidden_layers"])
    hidden = graph.node("Gather", graph.stored("model.embed_tokens.weight"), "input_ids")
    hidden = graph.widened(hidden, places["model.embed_tokens.weight"].dtype)
    attend = _plain_attention(graph, config) if plain else _attention(graph, config)
    for index in range(layers):
        hidden = _layer(graph, config, index, hidden, attend)
    hidden = graph.norm(hidden, "model.norm", config)
    head = "lm_head" if graph.has("lm_head") else "model.embed_tokens"
    graph.linear(hidden, head, output="logits")
    return _serialized(config, graph, layers)


class _Graph:
    """Nodes and tensors as they are added."""

    def __init__(self, places: Mapping[str, Place], quantization: Mapping[str, Any]) -> None:
        self.onnx, self.places = package(), places
        self.specs = {name: group["scheme"]["weight"] for group in quantization["groups"] for name in group["modules"]}
        self.level = int(quantization.get("accuracy_level", 0))
        self.decoded = quantization.get("quant_method") == "onnx-qdq"
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}

    def node(
        self, kind: str, *inputs: str, output: str = "", outputs: tuple[str, ...] = (), domain: str = "", **given: Any
    ) -> str:
        """Add a node; return the name of its first output."""
        name = output or f"v{len(self.nodes)}"
        names = [name, *outputs]
        self.nodes.append(
            self.onnx.helper.make_node(kind, list(inputs), names, domain=domain, name=f"n{len(self.nodes)}", **given)
        )
        return name

    def stored(self, name: str, kind: int | None = None, shape: tuple[int, ...] = ()) -> str:
        """Add a tensor of the checkpoint, read as another kind and shape where they are given; return its name."""
        if name not in self.tensors:
            place = self.places[name]
            data_type = self._type(place.dtype) if kind is None else kind
            tensor = self.onnx.TensorProto(name=name, dims=shape or place.shape, data_type=data_type)
            tensor.data_location = self.onnx.TensorProto.EXTERNAL
            nbytes = place.dtype.itemsize * torch.Size(place.shape).numel()
            for key, value in (("location", place.file), ("offset", place.begin), ("length", nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            self.tensors[name] = tensor
        return name

    def constant(self, name: str, value: Tensor) -> str:
        """Add a tensor that is in the graph itself; return its name."""
        if name not in self.tensors:
            data = value.contiguous().numpy().tobytes()
            kind = self._type(value.dtype)
            self.tensors[name] = self.onnx.TensorProto(name=name, dims=value.shape, data_type=kind, raw_data=data)
        return name

    def has(self, module: str) -> bool:
        """Whether a module has a weight of its own."""
        return f"{module}.weight" in self.places or module in self.specs

    def floats(self, name: str) -> str:
        """Return a tensor of the checkpoint in float32."""
        return self.widened(self.stored(name), self.places[name].dtype)

    def widened(self, value: str, dtype: torch.dtype) -> str:
        """Return a value of ``dtype`` in float32."""
        return value if dtype == torch.float32 else self.node("Cast", value, to=self._type(torch.float32))

    def norm(self, value: str, module: str, config: Mapping[str, Any]) -> str:
        """Return ``value`` divided by the root of its mean square, times a weight."""
        weight, eps = self.floats(f"{module}.weight"), float(config["rms_norm_eps"])
        return self.node("SimplifiedLayerNormalization", value, weight, axis=-1, epsilon=eps, stash_type=1)

    def linear(self, value: str, module: str, output: str = "") -> str:
        """Return ``value`` times the transposed weight of a module, plus its bias if it has one."""
        bias = f"{module}.bias" in self.places
        product = "" if bias else output
        if (spec := self.specs.get(module)) is None:
            found = self.node(
                "FusedMatMul", value, self.floats(f"{module}.weight"), output=product, domain=_CONTRIB, transB=1, alpha=1.0
            )
        elif self.decoded:
            weight = self.node("Transpose", self._decoded(module, spec), perm=[1, 0])
            found = self.node("MatMul", value, weight, output=product)
        else:
            parts = [self.stored(f"{module}.{part}") for part in ("codes", "scales")]
            parts += [] if spec["symmetric"] else [self.stored(f"{module}.zero_points")]
            (rows, blocks, nbytes), size = self.places[f"{module}.codes"].shape, int(spec["block"][1])
            given: dict[str, Any] = {"K": blocks * size, "N": rows, "bits": nbytes * 8 // size, "block_size": size}
            given |= {"accuracy_level": self.level} if self.level else {}
            found = self.node("MatMulNBits", value, *parts, output=product, domain=_CONTRIB, **given)
        return self.node("Add", found, self.floats(f"{module}.bias"), output=output) if bias else found

    def _decoded(self, module: str, spec: Mapping[str, Any]) -> str:
        """Return a quantized weight (out, in) in float32, decoded by ONNX's own operator."""
        kinds, size = self.onnx.TensorProto, int(spec["block"][1])
        rows, blocks, nbytes = self.places[f"{module}.codes"].shape
        wide = nbytes == size
        signed, unsigned = (kinds.INT8, kinds.UINT8) if wide else (kinds.INT4, kinds.UINT4)
        kind = int(signed if spec["symmetric"] else unsigned)
        parts = [self.stored(f"{module}.codes", kind, (rows, blocks * size)), self.stored(f"{module}.scales")]
        parts += [] if spec["symmetric"] else [self.stored(f"{module}.zero_points", kind, (rows, blocks))]
        return self.node("DequantizeLinear", *parts, axis=1, block_size=size)

    def _type(self, dtype: torch.dtype) -> int:
        kinds = self.onnx.TensorProto
        known = {
            torch.float32: kinds.FLOAT, torch.float16: kinds.FLOAT16, torch.bfloat16: kinds.BFLOAT16,
            torch.uint8: kinds.UINT8, torch.int64: kinds.INT64,
        }  # fmt: skip
        return int(known[dtype])


Attend = Callable[[tuple[str, str, str], list[str], tuple[str, str]], str]
"""Adds the attention of a layer: of queries, keys and values, past ones, and the names of the new ones; its output."""


def _attention(graph: _Graph, config: Mapping[str, Any]) -> Attend:
    """Return what adds ``GroupQueryAttention``, and add what all of them read: last positions, length, cosines and sines."""
    int32 = int(graph.onnx.TensorProto.INT32)
    one = graph.constant("one", torch.ones(1, dtype=torch.int64))
    tokens = graph.node("ReduceSum", "attention_mask", one, keepdims=0)
    last = graph.node("Cast", graph.node("Sub", tokens, one), to=int32)
    length = graph.node("Squeeze", graph.node("Shape", "attention_mask", start=1, end=2))
    given = (last, graph.node("Cast", length, to=int32), *_tables(graph, config))
    heads, kv_heads, size = _heads(config)

    def attend(inputs: tuple[str, str, str], past: list[str], present: tuple[str, str]) -> str:
        return graph.node(
            "GroupQueryAttention", *inputs, *past, *given, outputs=present, domain=_CONTRIB, num_heads=heads,
            kv_num_heads=kv_heads, scale=size**-0.5, do_rotary=1, rotary_interleaved=0, local_window_size=_window(config),
        )  # fmt: skip

    return attend


def _plain_attention(graph: _Graph, config: Mapping[str, Any]) -> Attend:
    """Return what adds attention of plain operators, and add what all layers read."""
    shared = attention.shared(graph, *_tables(graph, config), _window(config))
    return lambda inputs, past, present: attention.attend(graph, inputs, past, present, _heads(config), shared)


def _tables(graph: _Graph, config: Mapping[str, Any]) -> tuple[str, str]:
    """Add cosines and sines of all positions."""
    angles = torch.outer(torch.arange(int(config["max_position_embeddings"])).float(), decoder.inverse_frequencies(config))
    return graph.constant("cosines", angles.cos()), graph.constant("sines", angles.sin())


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the numbers of heads and of key/value heads, and the channels of one."""
    heads = int(config["num_attention_heads"])
    return heads, int(config.get("num_key_value_heads") or heads), decoder.head_size(config)


def _window(config: Mapping[str, Any]) -> int:
    """Return how many tokens a query sees, -1 for all."""
    window = config.get("sliding_window")
    return window if isinstance(window, int) and config.get("model_type") == "mistral" else -1


def _layer(graph: _Graph, config: Mapping[str, Any], index: int, hidden: str, attend: Attend) -> str:
    """Add one layer; return its output."""
    prefix, (heads, kv_heads, _) = f"model.layers.{index}", _heads(config)
    value = graph.norm(hidden, f"{prefix}.input_layernorm", config)
    query, key, values = (graph.linear(value, f"{prefix}.self_attn.{part}_proj") for part in "qkv")
    query = _head_norm(graph, config, query, f"{prefix}.self_attn.q_norm", heads)
    key = _head_norm(graph, config, key, f"{prefix}.self_attn.k_norm", kv_heads)
    past = [f"past_key_values.{index}.{what}" for what in ("key", "value")]
    attended = attend((query, key, values), past, (f"present.{index}.key", f"present.{index}.value"))
    hidden = graph.node("Add", hidden, graph.linear(attended, f"{prefix}.self_attn.o_proj"))
    value = graph.norm(hidden, f"{prefix}.post_attention_layernorm", config)
    gate, up = (graph.linear(value, f"{prefix}.mlp.{part}_proj") for part in ("gate", "up"))
    inner = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
    return graph.node("Add", hidden, graph.linear(inner, f"{prefix}.mlp.down_proj"))


def _head_norm(graph: _Graph, config: Mapping[str, Any], value: str, module: str, heads: int) -> str:
    """Return queries or keys with every head's channels normalized, where the model does that."""
    if not graph.has(module):
        return value
    size = decoder.head_size(config)
    apart = graph.constant(f"heads.{heads}", torch.tensor([0, 0, heads, size]))
    together = graph.constant(f"channels.{heads}", torch.tensor([0, 0, heads * size]))
    return graph.node("Reshape", graph.norm(graph.node("Reshape", value, apart), module, config), together)


def _serialized(config: Mapping[str, Any], graph: _Graph, layers: int) -> bytes:
    """Return the model's bytes, the same for the same graph."""
    helper, kinds = graph.onnx.helper, graph.onnx.TensorProto
    cached: list[str | int] = ["batch", int(config.get("num_key_value_heads") or config["num_attention_heads"])]

    def value(name: str, kind: int, *shape: str | int) -> Any:
        return helper.make_tensor_value_info(name, kind, list(shape))

    inputs = [
        value("input_ids", kinds.INT64, "batch", "sequence"),
        value("attention_mask", kinds.INT64, "batch", "past_and_sequence"),
    ]
    outputs = [value("logits", kinds.FLOAT, "batch", "sequence", int(config["vocab_size"]))]
    size = decoder.head_size(config)
    for index in range(layers):
        for what in ("key", "value"):
            inputs.append(value(f"past_key_values.{index}.{what}", kinds.FLOAT, *cached, "past", size))
            outputs.append(value(f"present.{index}.{what}", kinds.FLOAT, *cached, "past_and_sequence", size))
    made = helper.make_graph(graph.nodes, str(config.get("model_type")), inputs, outputs, list(graph.tensors.values()))
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=_IR, producer_name="quantkit")
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized


def genai_config(config: Mapping[str, Any], generation: Mapping[str, Any], graph: str) -> dict[str, Any]:
    """Return what onnxruntime-genai reads beside the graph and the tokenizer's files.

    Args:
        config: what config.json says.
        generation: what generation_config.json says, which counts more for the ends of answers.
        graph: name of the graph's file.
    """
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    present = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    heads, length = int(config["num_attention_heads"]), int(config["max_position_embeddings"])
    first, ends, padding = (generation.get(name, config.get(name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    last = ends[0] if isinstance(ends, list) and ends else ends
    search = {name: generation[name] for name in ("do_sample", "temperature", "top_k", "top_p") if name in generation}
    return {
        "model": {
            "type": config.get("model_type"),
            "bos_token_id": last if first is None else first,
            "eos_token_id": ends,
            "pad_token_id": last if padding is None else padding,
            "vocab_size": int(config["vocab_size"]),
            "context_length": length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": graph,
                "head_size": decoder.head_size(config),
                "hidden_size": int(config["hidden_size"]),
                "num_attention_heads": heads,
                "num_hidden_layers": int(config["num_hidden_layers"]),
                "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **names},
                "outputs": {"logits": "logits", **present},
            },
        },
        "search": {"max_length": length, "past_present_share_buffer": True, **search},
    }
