"""One architecture, tried from end to end: quantize, write, load, read by transformers, generate, plan, calibrate.

Runs in a process of its own (:mod:`tests.sweep.run`), because a model that quantkit cannot handle may take the process with it.
"""

import copy
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import quantkit
from quantkit.generation.generate import end_tokens
from quantkit.pipeline.plan import OUTSIDE
from tests.sweep import models

SCHEME = "w4a16"
STEPS = ("quantize", "load", "transformers", "generate", "plan", "gptq", "gptq_load")
Record = dict[str, Any]
Emit = Callable[[Record], None]
_HOME = str(Path(quantkit.__file__).parent)


class Wrong(Exception):
    """A step that ran and gave a wrong result; ``facts`` say how wrong."""

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts


def trial(name: str, folder: Path, emit: Emit) -> None:
    """Try the architecture called ``name`` (a registered type, or the path of a config.json).

    Args:
        name: see :func:`tests.sweep.models.config_of`.
        folder: a directory that is there and empty.
        emit: gets a mapping of step name to result after every step: what was found survives a crash in the next step.
    """
    run = _Trial(name, folder, emit)
    if run.step("build", run.build):
        run.everything()


class _Trial:
    def __init__(self, name: str, folder: Path, emit: Emit) -> None:
        self.name, self.folder, self.emit = name, folder, emit
        self.format = "compressed-tensors"
        self.results: dict[str, Any] = {}

    def step(self, key: str, action: Callable[[], Record]) -> bool:
        """Run one step and record what came of it; True if all is well."""
        started = time.monotonic()
        try:
            found = {"status": "ok", **action()}
        except quantkit.QuantkitError as error:
            found = {"status": "refused", "why": f"{type(error).__name__}: {error}", "at": _place(error)}
        except Wrong as error:
            found = {"status": "wrong", "why": str(error), **error.facts}
        except Exception as error:  # whatever a model's own code raises is a result too
            found = {"status": "crash", "why": f"{type(error).__name__}: {error}"[:400], "at": _place(error)}
        self.emit({key: {**found, "seconds": round(time.monotonic() - started, 2)}})
        return found["status"] == "ok"

    def everything(self) -> None:
        if not self.step("quantize", lambda: self.quantize("rtn", self.format, "written")):
            self.format = "native"
            if not self.step("native", lambda: self.quantize("rtn", "native", "written")):
                return
        if self.step("load", lambda: self.load("written")):
            self.step("generate", self.generate)
        if self.format != "native" and not self.step("transformers", self.read_by_transformers):
            self.step("float_round_trip", self.float_round_trip)
            self.format = "native"
            shutil.rmtree(self.folder / "written")
            if not self.step("native", lambda: self.quantize("rtn", "native", "written")):
                return
        self.step("plan", self.plan)
        if self.step("gptq", lambda: self.quantize("gptq", "native", "learned")):
            self.step("gptq_load", lambda: self.load("learned"))

    def build(self) -> Record:
        self.model = models.build(models.config_of(self.name))
        text = self.model.config.get_text_config()
        self.top = min(200, getattr(text, "vocab_size", 256))
        self.ids = torch.randint(3, self.top, (1, 20), generator=torch.Generator().manual_seed(1))
        found = logits(self.model, self.ids)
        if found.shape[:2] != (1, 20) or not bool(torch.isfinite(found).all()):
            raise Wrong(f"logits {tuple(found.shape)}, finite: {bool(torch.isfinite(found).all())}")
        self.float_logits, self.weights = found, weights_of(self.model)
        return {
            "class": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "encoder_decoder": bool(getattr(self.model.config, "is_encoder_decoder", False)),
        }

    def quantize(self, method: str, format: str, where: str) -> Record:
        ids = [torch.randint(3, self.top, (2, 32), generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
        result = quantkit.quantize(
            copy.deepcopy(self.model),
            SCHEME,
            method=method,
            out=self.folder / where,
            calibration=quantkit.Calibration(data=ids),
            output=quantkit.Output(format=format),
        )
        self.results[where] = result
        return {"format": format, "kl": result.metadata["quality"]["kl_mean"], **coverage(self.weights, result)}

    def load(self, where: str) -> Record:
        loaded = quantkit.load(self.folder / where, cache=False)
        if where == "written":
            self.loaded = loaded
        return _same(logits(loaded, self.ids), logits(self.results[where].model, self.ids), 2e-3)

    def read_by_transformers(self) -> Record:
        kind = type(self.model)
        model, info = kind.from_pretrained(self.folder / "written", dtype=torch.float32, output_loading_info=True)
        gaps = {key: sorted(info[key])[:3] for key in ("missing_keys", "unexpected_keys") if info[key]}
        try:
            return {**_same(logits(model.eval(), self.ids), logits(self.results["written"].model, self.ids), 1e-2), **gaps}
        except Wrong as error:
            raise Wrong(f"{error} {gaps}", **error.facts) from None

    def float_round_trip(self) -> Record:
        """Let transformers write and read the float model: where that fails, the fault is not in our files."""
        self.model.save_pretrained(self.folder / "float")
        model = type(self.model).from_pretrained(self.folder / "float", dtype=torch.float32)
        return _same(logits(model.eval(), self.ids), self.float_logits, 1e-4)

    def generate(self) -> Record:
        model, tokens = self.loaded, 8
        found: Record = {}
        try:
            with torch.no_grad():
                whole = model.generate(
                    self.ids,
                    attention_mask=torch.ones_like(self.ids),
                    do_sample=False,
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    pad_token_id=0,
                )
            found["transformers"] = whole[0, self.ids.shape[1] :].tolist()
        except Exception as error:  # its own generation may not know the architecture
            found["transformers_fails"] = f"{type(error).__name__}: {error}"[:200]
        longest = {"min_new_tokens": tokens} if end_tokens(model) else {}
        answer = quantkit.generate(model, self.ids[0].tolist(), max_new_tokens=tokens, logprobs=1, **longest)
        found["ours"] = list(answer.ids)
        full = logits(model, torch.cat([self.ids, torch.tensor([answer.ids])], 1))[0, self.ids.shape[1] - 1 : -1]
        want = full.log_softmax(-1)[torch.arange(tokens), answer.ids]
        got = torch.tensor([one.logprob for one in answer.logprobs or ()])
        found["logprob_error"] = float((got - want).abs().max())
        if found.get("transformers") != found["ours"] and not found["logprob_error"] < 2e-2:
            raise Wrong("other tokens than transformers generates, and than a forward of the whole text predicts", **found)
        return found

    def plan(self) -> Record:
        config = copy.deepcopy(self.model.config)
        config.architectures, config.dtype = [type(self.model).__name__], "float32"
        config.save_pretrained(self.folder / "config")
        recipe = self.folder / "recipe.yaml"
        output = {"path": str(self.folder / "planned"), "format": self.format}
        values = {"model": str(self.folder / "config"), "dtype": "float32", "scheme": SCHEME, "method": "rtn"}
        recipe.write_text(yaml.safe_dump({**values, "output": output}), encoding="utf-8")
        predicted = quantkit.plan_recipe(quantkit.load_recipe(recipe)).estimate.total_bytes
        counted = sum(row.bytes_after for row in self.results["written"].coverage)
        written = bytes_in(self.folder / "written")
        if not predicted == counted == written:
            raise Wrong(f"the plan says {predicted} bytes, the coverage table {counted}; {written} were written")
        return {"bytes": written}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return found


def _same(got: Tensor, want: Tensor, limit: float) -> Record:
    error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-9))
    if not error < limit:
        raise Wrong(f"logits differ by {error:.3g} of the largest", error=error)
    return {"error": error}


def _place(error: BaseException) -> str:
    """Return where an error came from: the last line of quantkit, and the last line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(_HOME)][-1:]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in (*frames[-1:], *own))


def weights_of(model: PreTrainedModel) -> dict[str, tuple[str, int]]:
    """Return name to kind and size of every weight that multiplies activations, as far as names and shapes tell.

    Kinds: "linear", "experts" (of a module called so), "matrix" (any other, not counted).
    """
    head, towers = model.get_output_embeddings(), _towers(model)
    found = {}
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if parameter.ndim < 2 or isinstance(module, nn.Embedding | _ConvNd) or module is head or name.startswith(towers):
            continue
        if isinstance(module, nn.Linear | Conv1D) and attribute == "weight":
            kind = "linear"
        else:
            owner = type(module).__name__.lower()
            kind = "experts" if "expert" in owner or "moe" in owner else "matrix"
        found[name] = (kind, parameter.numel())
    return found


def _towers(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the paths of models for images and sound inside the model, which stay in float."""
    text = type(model.config.get_text_config(decoder=True))
    parts = [(name, part) for name, part in model.named_modules() if name and isinstance(part, PreTrainedModel)]
    return tuple(f"{name}." for name, part in parts if type(part.config) not in (type(model.config), text))


def coverage(weights: dict[str, tuple[str, int]], result: quantkit.QuantizeResult) -> Record:
    """Compare the coverage table with what has become of the weights; return the share of linears and experts quantized.

    Layers outside the decoder layers stay in float unless a rule names them. They count where they are more than a third.
    """
    rows = {row.name: row for row in result.coverage}
    left = {name for name, _ in result.model.named_parameters()}
    reasons: Counter[str] = Counter()
    quantized = total = outside = 0
    lies = []
    for name, (kind, count) in weights.items():
        row = rows.get(name) or rows.get(name.removesuffix(".weight"))
        kept = name in left
        if row is None or kept != (row.kind == "skipped") or (kept and not row.reason):
            lies.append(name)
        elif kept:
            reasons[f"{kind}: {row.reason}"] += count
        if row is not None and kept and (row.reason or "").startswith(OUTSIDE):
            outside += count
            continue
        if kind != "matrix" and not (row is not None and row.reason == "router"):
            total += count
            quantized += 0 if kept else count
    total += outside if 2 * outside > total else 0
    facts = {
        "share": round(quantized / max(total, 1), 4),
        "kept": dict(reasons.most_common(6)),
        "fell_back": sum(row.kind == "fell back" for row in result.coverage),
        "counted": sum(row.parameters for row in result.coverage),
    }
    if lies:
        raise Wrong(f"{len(lies)} weights are not what the coverage table says, {lies[0]} first", **facts)
    return facts


def bytes_in(folder: Path) -> int:
    """Return the bytes of all tensors in a directory."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    return total
