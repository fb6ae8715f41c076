"""Sources with one tensor dropped, renamed, reshaped, retyped or truncated at random: an error, or a result that is right.

Half of the sources lie in several files with an index, which may be what is damaged: a file or an entry lost, or a wrong one.

    python -m tests.hf.fuzz_sources 500
    python -m tests.hf.fuzz_sources 500 --whole

Right is a model in memory in which every tensor of the damaged source has its place, or is carried over, bit for bit. A success
with a parameter that no tensor of the source holds is wrong, whatever it is filled with. With ``--whole`` what loads is also
quantized, written, and read back: every quantized weight within half a step of the source's, everything else bit for bit.
"""

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantkit import Output, load, quantize
from quantkit.errors import QuantkitError
from quantkit.hf.ledger import ledger_of
from quantkit.hf.load import load_float
from quantkit.hf.structure import describe
from quantkit.nn.linear import QuantModule
from quantkit.nn.sites import read_weight
from tests import towers
from tests.tiny import FAMILIES

MODELS = ("llama", "llama_tied", "mixtral", "qwen3_moe", "gpt2", "gemma3 with a tower", "deepseek_v3 with more layers")
OF_SHARDS = ("lose the file of", "lose the entry of", "misplace", "store twice", "lose the index and")
DTYPES = (torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64)


@cache
def original(name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the other files and the tensors of a model's directory."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        if name in FAMILIES:
            FAMILIES[name]().save_pretrained(path)
        else:
            towers.write(name.split()[0], path)
        return {file.name: file.read_text() for file in path.glob("*.json")}, load_file(path / "model.safetensors")


def rename(name: str, draw: random.Random) -> str:
    """Return another name: a letter dropped or changed, a number changed, a part left out or put in front."""
    parts = name.split(".")
    spot = draw.randrange(len(parts))
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    match draw.randrange(5):
        case 0:
            parts[spot] = parts[spot][:-1] or "x"
        case 1:
            parts[spot] += draw.choice(["x", "_inv", "2"])
        case 2 if numbers:
            parts[draw.choice(numbers)] = str(draw.randrange(9))
        case 3 if len(parts) > 1:
            del parts[spot]
        case _:
            parts.insert(0, draw.choice(["model", "module", "base"]))
    return ".".join(parts)


def reshape(tensor: Tensor, draw: random.Random) -> Tensor:
    """Return a tensor of another shape, with most of the numbers."""
    match draw.randrange(4):
        case 0:
            return tensor[: max(1, tensor.shape[0] - 1)]
        case 1:
            return torch.cat([tensor, tensor[:1]])
        case 2 if tensor.ndim > 1:
            return tensor.transpose(0, 1)
        case _:
            return tensor.reshape(-1) if tensor.ndim > 1 else tensor.unsqueeze(0)


def write(path: Path, tensors: dict[str, Tensor], count: int, victim: str, what: str, draw: random.Random) -> list[Path]:
    """Write ``tensors`` in ``count`` files with an index, and do ``what`` to the entry or the file of ``victim``."""
    if count == 1:
        save_file(tensors, path / "model.safetensors")
        return [path / "model.safetensors"]
    files = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    places = {name: files[index % count] for index, name in enumerate(draw.sample(sorted(tensors), len(tensors)))}
    for file in files:
        inside = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        if what == "store twice" and victim and file == files[(files.index(places[victim]) + 1) % count]:
            inside[victim] = torch.zeros_like(tensors[victim])
        save_file(inside, path / file)
    match what:
        case "lose the file of":
            (path / places[victim]).unlink()
        case "lose the entry of":
            del places[victim]
        case "misplace":
            places[victim] = files[(files.index(places[victim]) + 1) % count]
    size = sum(tensor.nbytes for tensor in tensors.values())
    if what != "lose the index and":
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return [path / file for file in files]


@contextmanager
def damaged(name: str, seed: int) -> Iterator[tuple[str, Path, dict[str, Tensor]]]:
    """Yield what was done, the damaged directory, and the tensors that its files hold."""
    draw = random.Random(seed)
    files, whole = original(name)
    tensors = dict(whole)
    victim = draw.choice(sorted(tensors))
    count = draw.choice([1, 1, 2, 3])
    kinds = ["drop", "rename", "swap", "reshape", "retype", "truncate", "repeat"]
    what = draw.choice(kinds if count == 1 else [*kinds, *OF_SHARDS])
    match what:
        case "drop":
            del tensors[victim]
        case "rename":
            tensors[new := rename(victim, draw)] = tensors.pop(victim)
            what += f" to {new}"
        case "swap":
            other = draw.choice(sorted(tensors))
            tensors[victim], tensors[other] = tensors[other], tensors[victim]
            what += f" with {other}"
        case "reshape":
            tensors[victim] = reshape(tensors[victim], draw)
        case "retype":
            tensors[victim] = tensors[victim].to(dtype := draw.choice(DTYPES))
            what += f" {dtype}"
        case "repeat":
            tensors[new := rename(victim, draw)] = tensors[victim]
            what += f" as {new}"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        for file, text in files.items():
            (path / file).write_text(text)
        own = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
        victims = write(path, own, count, victim if what in OF_SHARDS else "", what, draw)
        if what == "truncate":
            weights = draw.choice(victims)
            data = weights.read_bytes()
            weights.write_bytes(data[: draw.randrange(len(data))])
        yield f"{what} {victim}", path, tensors


def judge(name: str, seed: int) -> tuple[str, str | None]:
    """Load one damaged source; return what happened, and what is wrong with it if anything is."""
    with damaged(name, seed) as (what, path, tensors):
        label = f"{name} {seed}: {what}"
        try:
            model, _ = load_float(path)
        except QuantkitError as error:
            return "refused", None if str(path) in str(error) and len(str(error)) < 3000 else f"{label}: {error}"
        except Exception as error:  # anything else is what this looks for
            return "crashed", f"{label}: {error!r}"
        if what.startswith("truncate"):
            return "accepted", f"{label}: accepted"
        ledger = ledger_of(model)
        assert ledger is not None
        placed = {source for sources in ledger.fills.values() for source in sources}
        if placed | set(ledger.carried) != tensors.keys():
            return "accepted", f"{label}: {(placed | set(ledger.carried)) ^ tensors.keys()} is not accounted for"
        return "accepted", _wrong(label, model.state_dict(), ledger.fills, tensors)


def judge_whole(name: str, seed: int) -> tuple[str, str | None]:
    """Quantize one damaged source to a directory; return what happened, and what is wrong with the files if anything is."""
    happened, complaint = judge(name, seed)
    if happened != "accepted" or complaint:
        return happened, complaint
    with damaged(name, seed) as (what, path, _):
        label, out = f"{name} {seed}: {what}", path / "out"
        try:
            quantize(str(path), "w8a16-channel", method="rtn", out=out, output=Output(format="native"))
        except QuantkitError as error:
            return "refused later", None if len(str(error)) < 3000 else f"{label}: {error}"
        except Exception as error:  # anything else is what this looks for
            return "crashed", f"{label}: {error!r}"
        return "written", _misread(label, load_float(path)[0], load(out))


def _misread(label: str, source: nn.Module, written: nn.Module) -> str | None:
    """Say which weight of a written checkpoint is not that of its source."""
    quantized = set()
    for site in describe(source).sites:
        module = written.get_submodule(site.module)
        holder = module if isinstance(module, QuantModule) else getattr(module, site.parameter)
        if not isinstance(holder, QuantModule):
            continue
        quantized.add(f"{site.module}.{site.parameter}")
        weight = read_weight(source, site).float()
        step = weight.abs().amax(-1, keepdim=True) / 127.5
        if bool(((holder.dequantize() - weight).abs() > 0.57 * step + 1e-6).any()):  # half a step, and what float16 takes
            return f"{label}: {site.name} is not the source's"
    own = written.state_dict()
    rest = {name: value for name, value in source.state_dict().items() if name not in quantized}
    wrong = next((name for name, value in rest.items() if name not in own or not torch.equal(own[name], value)), None)
    return f"{label}: {wrong} is not the source's" if wrong else None if quantized else f"{label}: nothing was quantized"


def _wrong(label: str, state: dict[str, Tensor], fills: dict[str, tuple[str, ...]], tensors: dict[str, Tensor]) -> str | None:
    """Say what the model holds that the source does not: the multiset of its numbers, parameter by parameter."""
    for parameter, sources in fills.items():
        if parameter not in state:
            continue
        own = state[parameter]
        stored = torch.cat([tensors[source].reshape(-1).to(own.dtype) for source in sources])
        mine = torch.cat([state[p].reshape(-1) for p, others in fills.items() if others == sources and p in state])
        if not torch.equal(mine.sort().values, stored.sort().values):
            return f"{label}: {parameter} is not what {', '.join(sources[:3])} hold"
    tied = {name for name in state if name not in fills}
    known = {state[name].data_ptr() for name in fills if name in state}
    loose = [name for name in tied if state[name].data_ptr() not in known and state[name].is_floating_point()]
    return f"{label}: {loose[0]} comes from nowhere" if loose else None


def main(count: int, whole: bool) -> int:
    """Judge ``count`` damaged sources and print what was found."""
    tally: Counter[str] = Counter()
    wrong = []
    for seed in range(count):
        happened, complaint = (judge_whole if whole else judge)(MODELS[seed % len(MODELS)], seed)
        tally[happened] += 1
        wrong += [complaint] if complaint else []
    print(json.dumps(tally), *wrong, sep="\n")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), "--whole" in sys.argv))
