"""The account of a source's tensors: everything is placed, carried over or refused by name, before anything is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import checkpoint
from quantkit.errors import FormatError
from quantkit.hf.ledger import ledger_of
from quantkit.hf.load import load_float
from quantkit.pipeline.quantize import quantize
from tests.hf import fuzz_sources
from tests.tiny import FAMILIES, build

Tensors = dict[str, Tensor]


def source(path: Path, family: str = "llama", edit: Callable[[Tensors], None] = lambda tensors: None, **config) -> Path:
    """Write a tiny float model, its tensors changed by ``edit``."""
    FAMILIES[family](**config).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def edit_config(path: Path, **values) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


UP = "model.layers.1.mlp.up_proj.weight"


def pop(*names: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return edit


def put(name: str, make: Callable[[Tensors], Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = make(tensors).clone(memory_format=torch.contiguous_format)

    return edit


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return edit


def prefix(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[f"wrapped.{name}"] = tensors.pop(name)


EXPERT = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
WRONG = {
    "missing": ("llama", pop(UP), rf"1 missing: {UP}"),
    "missing norm": ("llama", pop("model.norm.weight"), r"missing: model\.norm\.weight"),
    "missing head": ("llama", pop("lm_head.weight"), r"missing: lm_head\.weight"),
    "missing table of a tied head": ("llama_tied", pop("model.embed_tokens.weight"), r"missing: .*embed_tokens"),
    "whole layer": ("llama", lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n], r"9 missing: .* and 5 more"),
    "prefix": ("llama", prefix, r"All names begin with 'wrapped\.'"),
    "renamed": ("llama", rename(UP, UP.replace("up_proj", "upproj")), rf"missing: {UP}.*no place for: .*upproj"),
    "reshaped": ("llama", put(UP, lambda t: t[UP][:-1]), rf"another shape: {UP} is \(95, 64\), want \(96, 64\)"),
    "transposed": ("llama", put(UP, lambda t: t[UP].T), r"is \(64, 96\), want \(96, 64\)"),
    "integers": ("llama", put(UP, lambda t: t[UP].to(torch.int8)), rf"another dtype: {UP} is int8"),
    "float8": ("llama", put(UP, lambda t: t[UP].to(torch.float8_e4m3fn)), r"is float8_e4m3fn"),
    "a bias too many": (
        "llama",
        put("model.layers.0.mlp.up_proj.bias", lambda t: t[UP][:, 0]),
        r"no place for: .*proj\.bias",
    ),
    "a scale": ("llama", put(f"{UP}_scale_inv", lambda t: t[UP][:1]), r"no place for: .*weight_scale_inv"),
    "a norm too many": ("llama", put("model.layers.0.self_attn.q_norm.weight", lambda t: t[UP][0]), r"no place for: .*q_norm"),
    "a layer too many": (
        "llama",
        lambda t: t.update({n.replace(".1.", ".2."): v.clone() for n, v in t.items() if ".layers.1." in n}),
        r"model\.layers\.2, one more than the 2",
    ),
    "twice": ("llama", put(UP.removeprefix("model."), lambda t: t[UP]), r"more than once: .* both"),
    "missing expert": ("mixtral", pop(EXPERT.format(1)), r"experts"),
    "last expert missing": ("mixtral", pop(EXPERT.format(3)), r"experts"),
    "renumbered expert": ("mixtral", rename(EXPERT.format(3), EXPERT.format(7)), r"list with gaps: .*numbers 0 to 3"),
    "shifted experts": ("mixtral", rename(EXPERT.format(0), EXPERT.format(4)), r"list with gaps"),
    "reshaped expert": ("mixtral", put(EXPERT.format(2), lambda t: t[EXPERT.format(2)][:-1]), r"experts"),
    "transposed experts": (
        "mixtral",
        lambda t: t.update({n: v.T.contiguous() for n, v in t.items() if ".w1." in n or ".w3." in n}),
        r"another shape",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_source_is_said_before_it_is_loaded(what: str, tmp_path, monkeypatch) -> None:
    family, edit, message = WRONG[what]
    path = source(tmp_path / "m", family, edit)
    monkeypatch.setattr("quantkit.hf.load.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(FormatError, match=message):
        load_float(path)


def test_one_error_names_everything(tmp_path) -> None:
    def edit(tensors: Tensors) -> None:
        del tensors["model.norm.weight"]
        tensors[UP] = tensors[UP][:3].clone()
        tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(96)

    path = source(tmp_path / "m", edit=edit)
    with pytest.raises(FormatError, match=r"1 of another shape: .*1 missing: .*1 that the model has no place for: "):
        quantize(path, method="rtn", out=tmp_path / "q")
    assert not (tmp_path / "q").exists()
    with pytest.raises(FormatError, match="1 missing"):
        checkpoint_plan(path)


def checkpoint_plan(path: Path) -> None:
    from quantkit.pipeline.quantize import plan

    plan(path)


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.05])
def test_a_truncated_file(keep: float, tmp_path) -> None:
    path = source(tmp_path / "m")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(FormatError, match="not a valid safetensors file"):
        load_float(path)


def sharded(path: Path, **config) -> Path:
    FAMILIES["llama"](**config).save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    return path


def test_shards_and_their_index_agree(tmp_path) -> None:
    path = sharded(tmp_path / "m")
    load_float(path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    some = {name: file for name, file in index["weight_map"].items() if file != files[1]}
    (path / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": some}))
    with pytest.raises(FormatError, match=f"names no tensor in {files[1]}"):
        load_float(path)
    (path / files[1]).unlink()
    with pytest.raises(FormatError, match="missing: "):
        load_float(path)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=f"{files[1]}: the file is missing"):
        load_float(path)


def test_two_sets_of_files(tmp_path) -> None:
    path = sharded(tmp_path / "m")
    save_file({"x": torch.zeros(1)}, path / "model.safetensors")
    with pytest.raises(FormatError, match=r"holds both model\.safetensors and"):
        load_float(path)


def test_files_of_torch_itself_count(tmp_path) -> None:
    path = source(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    model, _ = load_float(path)
    assert torch.equal(model.get_parameter(UP), tensors[UP])
    torch.save({name: tensor for name, tensor in tensors.items() if name != UP}, path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=f"1 missing: {UP}"):
        load_float(path)
    (path / "pytorch_model.bin").write_bytes(b"no archive")
    with pytest.raises(FormatError, match="cannot be read as tensors"):
        load_float(path)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
        ("llama", ["mtp.layers.0.mlp.up_proj.weight", "mtp.norm.weight", "visual.patch_embed.weight"]),
        ("llama", ["model.layers.2.eh_proj.weight", "model.layers.2.self_attn.q_proj.weight", "model.layers.2.enorm.weight"]),
    ],
)
def test_what_the_class_does_not_know_is_carried_over(family: str, names: list[str], tmp_path) -> None:
    def edit(tensors: Tensors) -> None:
        for index, name in enumerate(names):
            tensors[name] = torch.full((3, 4), index + 0.5)

    path = source(tmp_path / "m", family, edit)
    model, _ = load_float(path)
    ledger = ledger_of(model)
    assert ledger is not None
    assert sorted(ledger.carried) == sorted(names)
    placed = {name for sources in ledger.fills.values() for name in sources}
    assert placed | set(ledger.carried) == load_file(path / "model.safetensors").keys(), "each tensor is accounted for"
    assert not placed & set(ledger.carried)
    done = quantize(path, method="rtn", out=tmp_path / "q", output=_native())
    before = sum(row.bytes_before for row in done.coverage)
    assert before == sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values()), "to the byte"
    found = checkpoint.inspect(tmp_path / "q")
    assert found["carried_over"]["tensors"] == len(names)
    assert found["tensor_bytes"] == sum(row.bytes_after for row in done.coverage)
    again = checkpoint.load(tmp_path / "q")
    path = checkpoint.save(again, tmp_path / "second", format="native")
    written = load_file(path / "quantkit.safetensors")
    for index, name in enumerate(names):
        assert torch.equal(written[name], torch.full((3, 4), index + 0.5))


def _native():
    from quantkit.pipeline.settings import Output

    return Output(format="native")


@pytest.mark.parametrize("seed", range(0, 42, 7))
def test_damage_at_random(seed: int) -> None:
    """A part of the 500 cases of ``python -m tests.hf.fuzz_sources 500``."""
    for one in range(seed, seed + 7):
        _, complaint = fuzz_sources.judge(fuzz_sources.MODELS[one % 7], one)
        assert complaint is None


def test_a_tensor_of_a_wider_dtype_is_said(tmp_path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(torch.float32 if name == "model.norm.weight" else torch.bfloat16)

    path = source(tmp_path / "m", edit=edit)
    edit_config(path, dtype="bfloat16")
    done = quantize(path, method="rtn")
    row = next(row for row in done.coverage if row.name == "model.norm.weight")
    assert row.reason == "norm; float32 in the source, bfloat16 in the model"
    assert (row.bytes_before, row.bytes_after) == (256, 128)


def test_code_travels_only_if_it_is_trusted(tmp_path) -> None:
    path = source(tmp_path / "m")
    (path / "modeling_mine.py").write_text("x = 1")
    for trusted in (False, True):
        model, _ = load_float(path, trust_remote_code=trusted)
        quantize(model, method="rtn", out=tmp_path / str(trusted))
        assert (tmp_path / str(trusted) / "modeling_mine.py").exists() == trusted


def test_the_padding_row_is_the_sources(tmp_path) -> None:
    config = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    model = build("youtu", tie_word_embeddings=True, num_key_value_heads=4, **config)  # zeroes the row when it is loaded
    model.save_pretrained(tmp_path)
    loaded, _ = load_float(tmp_path)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
