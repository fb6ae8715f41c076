"""Tasks of the language model evaluation harness (extra ``eval``), with the answers of our engine.

A task asks for three things: the log-likelihood of a continuation after a context, of a whole text, and a continuation up to a
stop string. All become requests to one :class:`quantkit.Engine`, so they run side by side, with the kernels that serve users.

A task is a file in the harness's YAML or a name that it knows. Its files may hold Python code (``!function``), which runs; data
sets of named tasks come from the hub. Take files only from those whom you trust.

Harness: Gao et al., github.com/EleutherAI/lm-evaluation-harness.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from quantkit.engine.request import Limits, Request
from quantkit.engine.sampling import Sampling
from quantkit.errors import CalibrationError, QuantkitError
from quantkit.generation.engine import Engine
from quantkit.generation.generate import end_tokens
from quantkit.generation.text import TextStream

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise QuantkitError(f"tasks need {error.name}: pip install 'quantkit[eval]'") from error

LONGEST_ANSWER_TOKENS = 256
"""Longest answer to a task that does not say how long one may be."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One measure of one task.

    Attributes:
        task, metric, filter: what was measured, and the filter that answers went through.
        value: the measure.
        error: one standard error; None where the harness knows none.
        examples: how many examples were asked.
        shots: worked examples in each prompt.
    """

    task: str
    metric: str
    filter: str
    value: float
    error: float | None
    examples: int
    shots: int


class HarnessLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A model as the harness wants it.

    Args:
        model: a causal language model of transformers, quantized or not.
        tokenizer: its tokenizer.
        running: requests that run at the same time.
        **options: those of :class:`quantkit.Engine`: ``engine``, ``compute``, ``kv``.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, running: int = 8, **options: Any) -> None:
        super().__init__()
        self.tokenizer, self._ends = tokenizer, set(end_tokens(model))
        limits = Limits(running=running, waiting=1 << 20)
        self._engine = Engine(model, limits=limits, **options)
        self._longest = self._engine.limits.context_tokens or 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(min(self._ends)) if self._ends else int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: BOS, or else the one that ends texts."""
        known = self.tokenizer.bos_token_id
        return self.eot_token_id if known is None else int(known)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, under which the harness keeps prepared requests."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text; BOS is not added to one that begins with it."""
        bos = self.tokenizer.bos_token
        special = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, in the model's own form."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding would write it."""
        submitted = [self._score(context, continuation) for _, context, continuation in requests]
        self._run()
        return [_likelihood(one, len(continuation)) for one, (_, _, continuation) in zip(submitted, requests, strict=True)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, cut where it is longer than the model's context."""
        parts: list[list[tuple[Request, int]]] = []
        for one in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(one.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._longest - 2,  # the engine also writes a token, which nobody reads
                context_len=1,
            )
            cut = [make_disjoint_window(window) for window in windows]
            parts.append([(self._score(context, scored), len(scored)) for context, scored in cut])
        self._run()
        return [sum(_likelihood(request, count)[0] for request, count in part) for part in parts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model writes after each context, up to a stop string."""
        streams = []
        for one in requests:
            context, wanted = one.args
            options = dict(wanted)
            stops = options.pop("until", [])
            stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
            most = int(options.pop("max_gen_toks", options.pop("max_new_tokens", LONGEST_ANSWER_TOKENS)))
            sampling = _sampling(options)
            ids = self.tok_encode(context)[
                -(self._longest - most) :
            ]  # the end of a prompt that is too long, as the harness does
            stream = TextStream(self.tokenizer, stops)
            self._engine.submit(ids, max_new_tokens=most, sampling=sampling, stop_tokens=self._ends, watch=stream.add)
            streams.append(stream)
        self._run()
        return [stream.finish() for stream in streams]

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> Request:
        if len(continuation) > self._longest - 2:
            raise CalibrationError(f"a task scores {len(continuation)} tokens at once, the model's context is {self._longest}")
        ids = [*context, *continuation][-(self._longest - 1) :]
        return self._engine.submit(ids, max_new_tokens=1, logprobs=1, scores_prompt=True)

    def _run(self) -> None:
        for event in self._engine.run():
            if event.request.error is not None:
                raise event.request.error


def _likelihood(request: Request, count: int) -> tuple[float, bool]:
    """Return the log-likelihood of the last ``count`` tokens of a prompt, and whether each was the most likely one."""
    found = request.prompt_logprob[-count:] if count else []
    tokens = request.prompt[-count:] if count else []
    greedy = all(one.top[0][0] == token for one, token in zip(found, tokens, strict=True))
    return sum(one.logprob for one in found), greedy


def _sampling(options: dict[str, Any]) -> Sampling:
    """Return how tokens are chosen, from what a task says in the words of transformers."""
    samples = options.pop("do_sample", None)
    temperature = float(options.pop("temperature", 0.0 if not samples else 1.0))
    filters = {name: options.pop(name) for name in ("top_k", "top_p", "min_p") if name in options}
    if options:
        raise CalibrationError(
            f"a task asks for {', '.join(sorted(options))} in generation_kwargs, which quantkit does not know"
        )
    return Sampling() if samples is False or temperature == 0 else Sampling(temperature, **filters, seed=0)


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str | Path],
    *,
    shots: int | None = None,
    limit: int | None = None,
    **options: Any,
) -> list[TaskScore]:
    """Measure a model with tasks of the harness.

    Args:
        model: a causal language model of transformers, quantized or not.
        tokenizer: its tokenizer.
        tasks: files with tasks, or names of the harness.
        shots: worked examples in each prompt; None for what the task says.
        limit: only so many examples of each task.
        **options: those of :class:`HarnessLM`.

    Raises:
        CalibrationError: a task that does not exist, or cannot be read.
        QuantkitError: the extra ``eval`` is not installed, or an option that the engine lacks.
    """
    files = [Path(task) for task in tasks if str(task).endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise CalibrationError(f"--tasks {file}: there is no such file")
    folders = [str(folder.resolve()) for folder in {file.parent for file in files}]
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(tasks))  # thousands: a minute
    names = [_name_in(Path(task)) if Path(task) in files else str(task) for task in tasks]
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise CalibrationError(f"tasks: {unknown[0]!r} is neither a file (.yaml) nor a task that the harness knows")
    lm = HarnessLM(model, tokenizer, **options)
    try:
        found = simple_evaluate(
            model=lm,
            tasks=list(names),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except QuantkitError:
        raise
    except Exception as error:  # the harness and its data sets raise anything
        raise CalibrationError(
            f"tasks {', '.join(names)}: {type(error).__name__}: {str(error)[:300]}; the data sets of named tasks are on the hub"
        ) from error
    return _scores(found)


def _name_in(file: Path) -> str:
    """Return the name of the task in a file, without running what the file holds."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("task:")]
        name = yaml.safe_load(lines[0])["task"]
    except (OSError, ValueError, IndexError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CalibrationError(f"--tasks {file}: want a task in the harness's YAML, with a line 'task: NAME'") from error
    return str(name)


def _scores(found: Mapping[str, Any]) -> list[TaskScore]:
    scores = []
    for task, measured in found["results"].items():
        for key, value in measured.items():
            metric, separator, chosen = key.partition(",")
            if not separator or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = measured.get(f"{metric}_stderr,{chosen}")
            counts = found.get("n-samples", {}).get(task, {})
            shots = found.get("n-shot", {}).get(task) or 0
            known = float(error) if isinstance(error, int | float) else None
            scores.append(TaskScore(task, metric, chosen, float(value), known, int(counts.get("effective", 0)), int(shots)))
    return scores
