"""Commands that work: demo, run, train, eval, bench, generate."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli import app
from quantkit.cli.bars import progress_bars
from quantkit.cli.console import console, facts, hush, parse_settings, print_json, say, size, table
from quantkit.cli.groups import Opening, Running, Sampled, Text, values
from quantkit.cli.inspect import RecipeFile, Settings
from quantkit.cli.options import (
    AsJson,
    Device,
    Engine,
    MaxMemory,
    MaxNewTokens,
    Model,
    TrustRemoteCode,
    engine_options,
    load,
    read_prompt,
)
from quantkit.system.progress import Progress


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Hub id, directory, or demo for the embedded SmolLM2-135M-Instruct.")] = "demo",
    out: Annotated[Path, typer.Option(help="Where checkpoints and reports go; those of an earlier demo are replaced.")] = Path(
        "quantkit-demo"
    ),
    windows: Annotated[int, typer.Option(help="Evaluation windows of 512 tokens.")] = 16,
    quick: Annotated[bool, typer.Option("--quick", help="Little data: does it work? Not enough to judge by.")] = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    *,
    text: Text,
) -> None:
    """Quantize a model four ways, reload it, compare it with the original and time it."""
    from quantkit.cli.demo import DemoSettings, plan_demo, run_demo
    from quantkit.hf.code import trust_code
    from quantkit.report import comparison_table, coverage_table

    settings = DemoSettings(model=model, out=out, windows=windows, device=device, **values(text))
    settings = settings.quick() if quick else settings
    if trust_remote_code:
        trust_code(model)
    variants = plan_demo(settings)
    rows = [
        (
            v.label,
            ", ".join(v.estimate.schemes),
            f"{v.estimate.bits_per_weight:.3f}",
            size(v.estimate.total_bytes),
            size(v.estimate.peak_bytes),
        )
        for v in variants
    ]
    table(
        f"plan for {model}: bfloat16 is {size(variants[0].estimate.float_bytes)}",
        ("row", "grid", "bits", "file", "peak memory"),
        rows,
    )
    with progress_bars() as progress:
        result = run_demo(settings, variants, progress)
    console().print(coverage_table(result.coverage))
    console().print(comparison_table(result.reports))
    best = next(reversed(result.checkpoints.values()))
    facts(
        {
            "report": f"{result.html} (open it in a browser), {result.json}",
            "look": f"quantkit inspect {best}",
            "talk": f'quantkit generate {best} --chat "What is the capital of France?"',
            "use": f'transformers: AutoModelForCausalLM.from_pretrained("{best}"); vLLM: vllm serve {best}',
        }
    )


@app.command()
def run(
    recipe: RecipeFile,
    settings: Settings = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Carry out a recipe: quantize, write, prove, measure. An interrupted run continues.

    Several processes do it together: torchrun --nproc-per-node N -m quantkit run RECIPE.
    """
    from quantkit.recipe.schema import load_recipe
    from quantkit.system.workers import launched

    asked = {"run.device": device} if device != "auto" else {}
    asked |= {"run.max_memory": max_memory} if max_memory is not None else {}
    with launched() as workers:
        carry_out(load_recipe(recipe, asked | parse_settings(settings)), as_json, trust_remote_code, workers)


def carry_out(
    recipe: Any, json: bool, trust_remote_code: bool, workers: Any, after_event: Callable[[], None] | None = None
) -> None:
    """Carry out a checked recipe and show what became of it; ``after_event`` is called after every event of its progress.

    Of several ``workers`` the one that writes shows something.
    """
    from quantkit.hf.code import trust_code
    from quantkit.recipe.run import run_recipe
    from quantkit.report import comparison_table, coverage_table

    if trust_remote_code:
        trust_code(recipe.model)
    if not workers.writes:
        hush(True)
        logging.getLogger("quantkit").setLevel(logging.ERROR)
        run_recipe(recipe, workers=workers)
        return
    with progress_bars() as bars:

        def progress(event: Progress) -> None:
            bars(event)
            if after_event is not None:
                after_event()

        outcome = run_recipe(recipe, progress, workers)
    result, report = outcome.result, outcome.report
    if json:
        print_json(result.to_dict() | ({"evaluation": report.to_dict()} if report else {}))
        return
    for note in outcome.preview.resolution.notes if not result.metadata.get("search") else ():
        say(f"note: {note}")
    console().print(coverage_table(result.coverage))
    if report is not None:
        console().print(comparison_table([report]))
    facts(result.facts())
    say(f"{'already done:' if result.already_done else 'written to'} {result.path}")
    say(f"next: quantkit chat {result.path}, quantkit eval {result.path} --base {recipe.model}", stderr=True)


@app.command()
def train(
    recipe: RecipeFile,
    settings: Settings = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the losses so far here, again and again.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a quantized model behind its rounding, as the section train of a recipe says; an interrupted run continues."""
    from quantkit.errors import RecipeError
    from quantkit.recipe.schema import load_recipe
    from quantkit.report.trained import LivePage
    from quantkit.system.workers import launched

    asked = {"run.device": device} if device != "auto" else {}
    loaded = load_recipe(recipe, asked | parse_settings(settings))
    if loaded.train is None:
        raise RecipeError(f"{recipe}: there is no section train; add one, such as train: {{steps: 200}}, or use quantkit run")
    page = LivePage(Path(str(loaded.output.path)), html, f"{loaded.model}: training") if html is not None else None
    with launched() as workers:
        carry_out(loaded, as_json, trust_remote_code, workers, page)
    if page is not None:
        page(over=True)


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help="Models to time; speed-ups are against the first.")],
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded per round.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds in which every model is timed once.")] = 5,
    engine: Engine = "auto",
    as_json: AsJson = False,
    *,
    opening: Opening,
) -> None:
    """Time several models in turn, round by round."""
    import dataclasses

    from quantkit.evaluation import compare_latency

    opened = {name: load(name, **values(opening))[0] for name in models}
    with progress_bars() as progress:
        found = compare_latency(
            opened,
            context=context,
            new_tokens=new_tokens,
            rounds=rounds,
            engine=engine,
            compute=opening.compute,
            progress=progress,
        )
    if as_json:
        print_json({name: dataclasses.asdict(one) for name, one in found.items()})
        return
    rows = [
        (
            name,
            one.engine,
            f"{one.prefill_tokens_per_s.median:.0f}",
            f"{one.decode_ms.median:.2f}",
            f"{one.decode_ms.p90:.2f}",
            f"{one.speedup.decode.median:.2f}x" if one.speedup else "1",
        )
        for name, one in found.items()
    ]
    first = next(iter(found.values()))
    title = f"prompt {context}, {new_tokens} new tokens, {rounds} rounds in turn, {first.threads} threads, {first.device}"
    table(title, ("model", "run by", "prefill tokens/s", "decode ms", "p90", "decode speed-up"), rows)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; - or nothing reads it from a pipe.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    as_json: AsJson = False,
    *,
    sampled: Sampled,
    running: Running,
    opening: Opening,
) -> None:
    """Continue a prompt and show the text as it comes."""
    import dataclasses

    from quantkit.generation.generate import generate as continue_text
    from quantkit.nn.install import describe_compute

    prompt = read_prompt(prompt)
    opened, tokenizer = load(model, **values(opening))
    done = continue_text(
        opened,
        [{"role": "user", "content": prompt}] if chat else prompt,
        tokenizer,
        max_new_tokens=max_new_tokens,
        stream=None if as_json else _show,
        compute=opening.compute,
        **values(sampled),
        **engine_options(running),
    )
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    typer.echo()
    later = sorted(done.decode_ms)
    speed = f", {later[len(later) // 2]:.1f} ms per token (median)" if later else ""
    guessed = f", {done.accepted} of {done.drafted} drafts accepted" if running.drafter else ""
    first = f"first token after {done.prefill_ms:.0f} ms"
    rounds = describe_compute(opened)
    how = f"; {rounds}" if rounds not in ("", "exact") else ""
    say(f"[{len(done.ids)} tokens, {done.finish_reason}; {first}{speed}{guessed}{how}]", stderr=True)


def _show(piece: str) -> None:
    """Print a piece of text at once."""
    typer.echo(piece, nl=False)
    sys.stdout.flush()
