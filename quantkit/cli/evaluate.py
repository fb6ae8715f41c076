"""The command eval: how good a model is, by text, by what it writes, and by tasks."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli import app
from quantkit.cli.bars import progress_bars
from quantkit.cli.console import console, print_json, say, table
from quantkit.cli.groups import Opening, values
from quantkit.cli.options import AsJson, Column, Data, Model, Template, load

Tasks = Annotated[
    list[str] | None,
    typer.Option(help="A task of lm-eval instead: a file (.yaml) or a name; give it several times. Needs the extra eval."),
]
Protocol = Annotated[
    str | None, typer.Option(help="Score as others do: gptq-2048 (most papers) or llama.cpp-512; needs their --data.")
]


@app.command("eval")
def evaluate(
    model: Model,
    base: Annotated[str | None, typer.Option(help="The model it should agree with, for KL and agreement.")] = None,
    data: Data = None,
    column: Column = None,
    template: Template = None,
    windows: Annotated[int | None, typer.Option(help="Windows that are scored; default: 20, or all with --protocol.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a window; default: 1024.")] = None,
    protocol: Protocol = None,
    samples: Annotated[int, typer.Option(help="Prompts that the model and its base continue, to be read.")] = 3,
    no_instructions: Annotated[
        bool, typer.Option("--no-instructions", help="Leave out the twenty prompts that models with a chat template answer.")
    ] = False,
    long_context: Annotated[int, typer.Option(help="Score one window of so many tokens too, in parts; 0 for none.")] = 0,
    tasks: Tasks = None,
    shots: Annotated[int | None, typer.Option(help="Worked examples in each prompt of a task; default: what it says.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many examples of each task.")] = None,
    latency: Annotated[bool, typer.Option(help="Measure speed too.")] = True,
    kv: Annotated[str | None, typer.Option(help="Read keys and values from a memory: float, int8 or int4.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report here (JSON).")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots here.")] = None,
    as_json: AsJson = False,
    *,
    opening: Opening,
) -> None:
    """Measure a model: perplexity, distance from a base model, speed, size; or tasks of lm-eval."""
    if tasks:
        _measure_tasks(
            model, tasks, {"shots": shots, "limit": limit, **({"kv": kv} if kv else {})}, values(opening), out, as_json
        )
        return
    from quantkit.evaluation import evaluate as measure
    from quantkit.hf.source import locate, refuse_mistyped

    if base:
        refuse_mistyped(locate(base))  # before the model is loaded
    chosen = {"windows": windows, "length": length, "protocol": protocol}
    opened, tokenizer = load(model, **values(opening))
    place: dict[str, Any] = {"device": opening.device, "dtype": opening.dtype, "trust_remote_code": opening.trust_remote_code}
    with progress_bars() as progress:
        report = measure(
            opened,
            load(base, **place)[0] if base else None,
            data=data,
            column=column,
            template=template,
            tokenizer=tokenizer,
            samples=samples,
            instructions=not no_instructions,
            long_context=long_context,
            latency=latency,
            kv=kv,
            label=Path(model).name,
            base_label=base,
            progress=progress,
            **{name: value for name, value in chosen.items() if value is not None},  # type: ignore[arg-type]
        )
    _show(report, model, out, html, as_json)


def _show(report: Any, model: str, out: Path | None, html: Path | None, as_json: bool) -> None:
    from quantkit.evaluation.instructions import summary
    from quantkit.mixed.recorded import PLAN_FILE
    from quantkit.report import comparison_table, continuation_rows, distance_rows, write_html

    if as_json:
        print_json(report.to_dict())
    else:
        console().print(comparison_table([report]))
        if report.continuations:
            table("greedy continuations", *continuation_rows(report.continuations))
        if report.long_context:
            table("one long window, in parts", *distance_rows(report.long_context))
        if report.instructions:
            say(f"instructions followed: {summary(report.instructions)} (--html shows the answers)")
    if out is not None:
        report.save(out)
        say(f"written: {out}", stderr=True)
    if html is not None:
        found = Path(model) / PLAN_FILE
        write_html(html, [report], search=found if found.is_file() else None, training=Path(model))
        say(f"written: {html} (open it in a browser)", stderr=True)


def _measure_tasks(
    model: str, tasks: list[str], options: dict[str, Any], opening: dict[str, Any], out: Path | None, as_json: bool
) -> None:
    """Run tasks of the harness and show their scores."""
    import dataclasses

    from quantkit.evaluation.harness import run_tasks
    from quantkit.system.files import write_json

    opened, tokenizer = load(model, **opening)
    scores = run_tasks(opened, tokenizer, tasks, **options)
    if as_json:
        print_json([dataclasses.asdict(score) for score in scores])
    else:
        cells = [
            (
                one.task,
                one.metric,
                f"{one.value:.4f}" + ("" if one.error is None else f" ± {one.error:.4f}"),
                str(one.examples),
                str(one.shots),
            )
            for one in scores
        ]
        table(f"tasks: {Path(model).name}", ("task", "measure", "value", "examples", "shots"), cells)
    if out is not None:
        write_json(out, [dataclasses.asdict(score) for score in scores])
        say(f"written: {out}", stderr=True)
