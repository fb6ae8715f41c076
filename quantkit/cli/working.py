"""Commands that work: demo, run, eval, bench, generate."""

from typing import Annotated

import typer

from quantkit.cli import app
from quantkit.cli.show import console


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, float model, or demo.")],
    prompt: str,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
) -> None:
    """Continue a prompt and show the text as it comes."""
    from quantkit.generate import generate as continue_text
    from quantkit.run import open_model

    opened, tokenizer = open_model(model)
    done = continue_text(
        opened,
        [{"role": "user", "content": prompt}] if chat else prompt,
        tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stream=lambda piece: typer.echo(piece, nl=False),
    )
    typer.echo()
    later = sorted(done.decode_ms)
    speed = f", {later[len(later) // 2]:.1f} ms per token (median)" if later else ""
    summary = f"[{len(done.ids)} tokens, {done.finish_reason}; first token after {done.prefill_ms:.0f} ms{speed}]"
    console(stderr=True).print(summary, markup=False, highlight=False)
