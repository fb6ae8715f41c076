"""Commands that look and do not change anything: plan, inspect, list, doctor."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import app
from quantkit.cli.console import facts, parse_settings, say, size, table
from quantkit.cli.options import TrustRemoteCode
from quantkit.registry import Registry

if TYPE_CHECKING:
    from quantkit.recipe.run import Preview

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe, e.g. calibration.samples=8."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def plan(recipe: Path, settings: Settings = None, as_json: AsJson = False, trust_remote_code: TrustRemoteCode = False) -> None:
    """Predict bits, bytes, peak memory and passes of a recipe, without touching weights."""
    import dataclasses

    from quantkit.hf.code import trust_code
    from quantkit.recipe.run import plan_recipe
    from quantkit.recipe.schema import load_recipe

    loaded = load_recipe(recipe, parse_settings(settings))
    if trust_remote_code:
        trust_code(loaded.model)
    preview = plan_recipe(loaded)
    found = preview.estimate
    if as_json:
        sites = {name: scheme.weight.describe() for name, scheme in preview.resolution.plan.items()}
        typer.echo(json.dumps({**dataclasses.asdict(found), "plan": sites, "notes": preview.resolution.notes}, indent=2))
        return
    rows = [(name, "quantized", str(count), f"{weights:,}") for name, (count, weights) in found.schemes.items()]
    rows += [(reason, "kept", str(count), f"{numel:,}") for reason, (count, numel) in found.kept.items()]
    table(f"{preview.recipe.model} with {recipe}", ("scheme or reason", "", "tensors", "parameters"), rows)
    facts(
        {
            "bits per quantized weight": f"{found.bits_per_weight:.3f}",
            "checkpoint": f"{size(found.total_bytes)} (float: {size(found.float_bytes)}), {preview.recipe.output.format}",
            "written to": str(preview.recipe.output.path),
            "peak memory, about": size(found.peak_bytes),
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
    seconds = training_seconds(recipe.train, contents.model, sites, recipe.calibration.length)
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
    path: Path,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every tensor with its checksum.")] = False,
    as_json: AsJson = False,
) -> None:
    """Describe a quantized checkpoint without loading it."""
    from quantkit.checkpoint import inspect as look

    found = look(path, verify=verify)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    facts(
        {
            "model": f"{found['model']}, {found['dtype']}",
            "format": found["format"],
            "schemes": "\n".join(f"{row['describe']}: {row['layers']} layers" for row in found["schemes"]),
            "parameters": f"{found['parameters']:,} ({found['quantized_parameters']:,} quantized)",
            "bits per quantized weight": f"{found['quantized_bits_per_weight']:.3f}",
            "bits per parameter": f"{found['bits_per_weight']:.3f}",
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
        typer.echo(json.dumps(found, indent=2))
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


def _flat(value: Any, name: str = "recorded") -> dict[str, str]:
    """Return a nested mapping as dotted names and texts."""
    if not isinstance(value, dict):
        return {name: str(value)}
    return {key: text for k, v in value.items() for key, text in _flat(v, f"{name}.{k}").items()}


def _reason(row: dict[str, Any]) -> str:
    return row["reason"] or ", ".join(f"{key} {value}" for key, value in (row["details"] or {}).items())
