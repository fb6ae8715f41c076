"""Commands that look and do not change anything: plan, inspect, list, doctor."""

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import app
from quantkit.cli.console import facts, parse_settings, print_json, say, size, table
from quantkit.cli.fits import COMPARED, show_fits
from quantkit.cli.options import (
    AsJson,
    BudgetText,
    Choices,
    Device,
    Dtype,
    Formats,
    Include,
    Length,
    MaxMemory,
    Method,
    Revision,
    Samples,
    Scheme,
    Steps,
    TrustRemoteCode,
    at_revision,
    recipe_from,
    scheme_or_budget,
)
from quantkit.errors import QuantkitError
from quantkit.registry import Registry

if TYPE_CHECKING:
    from quantkit.recipe.run import Preview

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe, e.g. calibration.samples=8."),
]


RecipeFile = Annotated[Path, typer.Argument(help="Recipe (YAML); quantkit init MODEL writes one to begin with.")]


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE or MODEL", help="Recipe (YAML), or a model and options.")],
    settings: Settings = None,
    scheme: Scheme = None,
    budget: BudgetText = None,
    choice: Choices = None,
    include: Include = None,
    method: Method = "gptq",
    step: Steps = None,
    samples: Samples = 128,
    length: Length = 512,
    format: Formats = None,
    dtype: Dtype = "auto",
    max_memory: MaxMemory = None,
    serve: Annotated[bool, typer.Option("--serve", help="What fits this machine: memory and ms per token.")] = False,
    context: Annotated[list[int] | None, typer.Option(help="With --serve: tokens of context; several times.")] = None,
    users: Annotated[list[int] | None, typer.Option(help="With --serve: users at the same time; several times.")] = None,
    kv: Annotated[str, typer.Option("--kv", help="With --serve: keys and values in float or int8.")] = "float",
    device: Device = "auto",
    revision: Revision = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Predict bits, bytes, peak memory and passes of a recipe, or of quantkit quantize MODEL, without touching weights."""
    from quantkit.hf.code import trust_code
    from quantkit.recipe.run import plan_recipe
    from quantkit.recipe.schema import load_recipe

    def of_model(scheme: str | None) -> Any:
        return recipe_from(
            at_revision(recipe, revision), Path("(--out)"), scheme_or_budget(scheme, budget, choice, include), method=method,
            steps=step or [], dtype=dtype, data=None, column=None, template=None, samples=samples, length=length,
            formats=format, run={"max_memory": max_memory},
        )  # fmt: skip

    shown: dict[str, Any] = {"kv": kv, "device": device, "as_json": as_json}
    if serve and _is_checkpoint(recipe):
        show_fits(recipe, None, context, users, **shown)
        return
    asked = {"run.max_memory": max_memory} if max_memory is not None else {}
    loaded = load_recipe(recipe, asked | parse_settings(settings)) if is_recipe(recipe) else of_model(scheme)
    if trust_remote_code:
        trust_code(loaded.model)
    if not serve:
        _show_plan(plan_recipe(loaded), recipe, as_json)
    elif is_recipe(recipe) or scheme or budget:
        show_fits(recipe, {scheme or budget or Path(recipe).name: plan_recipe(loaded)}, context, users, **shown)
    else:
        show_fits(recipe, {name: plan_recipe(of_model(name)) for name in COMPARED}, context, users, **shown)


def _is_checkpoint(text: str) -> bool:
    """Return whether a name is that of a directory with a quantized model."""
    from quantkit.system.files import read_json

    config = Path(text) / "config.json"
    return os.path.isfile(config) and "quantization_config" in read_json(config)


def is_recipe(text: str) -> bool:
    """Return whether a name is that of a recipe rather than of a model."""
    path = Path(text)
    return path.suffix in (".yaml", ".yml") or (os.path.isfile(text) and path.suffix != ".gguf")


def _show_plan(preview: "Preview", recipe: str, as_json: bool) -> None:
    found = preview.estimate
    if as_json:
        sites = {name: scheme.weight.describe() for name, scheme in preview.resolution.plan.items()}
        print_json({**dataclasses.asdict(found), "plan": sites, "notes": preview.resolution.notes})
        return
    rows = [(name, "quantized", str(count), f"{weights:,}") for name, (count, weights) in found.schemes.items()]
    rows += [(reason, "kept", str(count), f"{numel:,}") for reason, (count, numel) in found.kept.items()]
    of_recipe = is_recipe(recipe)
    table(
        f"{preview.recipe.model}{f' with {recipe}' if of_recipe else ''}",
        ("scheme or reason", "", "tensors", "parameters"),
        rows,
    )
    facts(
        {
            "bits per quantized weight": f"{found.bits_per_weight:.3f}",
            "checkpoint": f"{size(found.total_bytes)} (float: {size(found.float_bytes)}), {preview.recipe.output.format}",
            **({"and with the same codes": ", ".join(also)} if (also := preview.recipe.output.formats[1:]) else {}),
            **({"written to": str(preview.recipe.output.path)} if of_recipe else {}),
            "peak memory, about": size(found.peak_bytes),
            "on the disk, at most": size(found.disk_bytes),
            **_training_time(preview),
            "passes": "\n".join(found.passes),
        }
    )
    for note in preview.resolution.notes:
        say(f"note: {note}")


def _training_time(preview: "Preview") -> dict[str, str]:
    """Return how long the updates of a recipe will take here, if it has any, as a fact to show."""
    from quantkit.pipeline.training.timing import training_seconds

    recipe, contents = preview.recipe, preview.contents
    if recipe.train is None:
        return {}
    sites = [site for site in contents.structure.sites if site.name in preview.resolution.plan]
    seconds = training_seconds(recipe.train, contents.model, sites, recipe.calibration.length, recipe.calibration.samples)
    if seconds is None:
        return {}
    each = seconds / recipe.train.steps
    return {
        "updates, about": f"{seconds / 60:.0f} minutes on this machine, {each:.2g} s each"
        if seconds > 90
        else f"{seconds:.1f} s"
    }


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Directory or GGUF file of a quantized checkpoint, whoever wrote it.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every tensor with its checksum.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="What became of every layer, and why some stayed in float.")] = False,
    as_json: AsJson = False,
) -> None:
    """Describe a quantized checkpoint without loading it; --layers says why a layer was skipped."""
    from quantkit.checkpoint import inspect as look

    found = look(path, verify=verify)
    rows = _layers(path) if layers else []
    if as_json:
        print_json(found | ({"layers": rows} if layers else {}))
        return
    if layers:
        heads = ("layer", "kind", "scheme", "loss", "reason")
        table(f"{path}", heads, [tuple(row[head] for head in heads) for row in rows])
        return
    facts(
        {
            "model": f"{found['model']}, {found['dtype']}",
            "format": found["format"],
            "schemes": "\n".join(f"{row['describe']}: {row['layers']} layers" for row in found["schemes"]),
            "parameters": f"{found['parameters']:,} ({found['quantized_parameters']:,} quantized)",
            "bits per quantized weight": f"{found['quantized_bits_per_weight']:.3f}",
            "bits per parameter": f"{found['bits_per_weight']:.3f}",
            "on a CPU": found["compute"],
            "carried over": f"{found['carried_over']['tensors']} tensors, {size(found['carried_over']['bytes'])}",
            "size": f"{size(found['bytes'])} in {len(found['shards'])} file(s)",
            **({"verified": "every tensor has its checksum"} if verify else {}),
        }
    )
    facts(_flat(found["metadata"]))


@app.command("list")
def list_names(as_json: AsJson = False) -> None:
    """List what recipes and commands can name: schemes, quantizers, steps, formats and more, also from other packages."""
    from quantkit.calibrate.collectors import COLLECTORS
    from quantkit.engine.drafters.base import DRAFTERS
    from quantkit.formats.base import FORMATS
    from quantkit.kernels.select import KERNELS
    from quantkit.presets import SCHEMES
    from quantkit.quantizers.base import QUANTIZERS
    from quantkit.transforms.base import STEPS

    families: tuple[Registry[Any], ...] = (SCHEMES, QUANTIZERS, STEPS, FORMATS, KERNELS, DRAFTERS, COLLECTORS)
    if as_json:
        typer.echo(json.dumps({f"{family.kind}s": family.names() for family in families}, indent=2))
        return
    facts({f"{family.kind}s": ", ".join(family.names()) for family in families})
    for family in families:
        for reason in family.broken().values():
            say(f"note: {reason}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say which kernels this machine can run and why not the others, and what else matters."""
    from quantkit.cli.doctor import examine

    found = examine()
    if as_json:
        print_json(found)
        return
    rows = [(row["kernel"], "yes" if row["available"] else "no", _reason(row)) for row in found.pop("kernels")]
    facts({name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in found.items()})
    table("kernels, best first", ("kernel", "runs", "details"), rows)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what it holds.")] = False,
    on: Annotated[bool | None, typer.Option("--on/--off", help="Keep weights from now on, or no more.")] = None,
) -> None:
    """Show the weights kept in the kernels' layout and from GGUF files, which make a second load fast; clear or turn it off."""
    from quantkit.checkpoint import prepacked
    from quantkit.hf import gguf

    if on is not None:
        prepacked.switch(on)
    if clear:
        say(f"removed {size(prepacked.clear() + gguf.clear())}")
    say(prepacked.describe())
    say(f"{size(gguf.used_bytes())} read from GGUF files")


def _layers(path: Path) -> list[dict[str, str]]:
    """Return what a checkpoint records of every layer.

    Raises:
        QuantkitError: it records nothing.
    """
    from quantkit.checkpoint import read_record

    record = read_record(path)
    if record is None or not record.run:
        raise QuantkitError(
            f"{path} does not record what became of its layers: no run of quantkit wrote it; leave --layers out"
        )
    losses = record.run["losses"]
    return [
        {
            "layer": row["name"],
            "kind": row["kind"],
            "scheme": row["scheme"] or "",
            "loss": f"{losses[row['name']]:.2e}" if row["name"] in losses else "",
            "reason": row["reason"] or "",
        }
        for row in record.run["coverage"]
    ]


def _flat(value: Any, name: str = "recorded") -> dict[str, str]:
    """Return a nested mapping as dotted names and texts."""
    if not isinstance(value, dict):
        return {name: str(value)}
    return {key: text for k, v in value.items() for key, text in _flat(v, f"{name}.{k}").items()}


def _reason(row: dict[str, Any]) -> str:
    return row["reason"] or ", ".join(f"{key} {value}" for key, value in (row["details"] or {}).items())
