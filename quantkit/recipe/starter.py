"""A recipe to begin with, and the JSON schema by which editors complete and check recipes."""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from quantkit.presets import SCHEMES
from quantkit.quantizers.base import QUANTIZERS
from quantkit.recipe.schema import Recipe
from quantkit.transforms.base import STEPS

SCHEMA_FILE = "quantkit.schema.json"
"""Name under which the starter recipe looks for the schema, beside itself."""


_PYTHON_ONLY = {"Run": ("compute", "progress", "workers"), "SchemeChoice": ("full",)}
"""Settings that no text can say."""


class _Plain(GenerateJsonSchema):
    """The schema of what YAML can hold; a value that only Python can give has none."""

    def is_instance_schema(self, schema: core_schema.IsInstanceSchema) -> JsonSchemaValue:
        """Leave it open; see :data:`_PYTHON_ONLY`."""
        return {}

    def emit_warning(self, kind: Any, detail: str) -> None:
        """Say nothing of defaults that JSON cannot hold; they are left out."""


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes (draft 2020-12), with the names that are registered here.

    It knows what may be said in one word: a scheme, a method, a step. Whether names fit a model, only a plan can say.
    """
    schema = Recipe.model_json_schema(schema_generator=_Plain)
    top, rule = schema["properties"], schema["$defs"]["Rule"]["properties"]
    for holder, name, names in (
        (top, "scheme", SCHEMES.names()),
        (rule, "scheme", SCHEMES.names()),
        (top, "method", QUANTIZERS.names()),
        (top["steps"], "items", STEPS.names()),
    ):
        whole = holder[name]
        said = {key: whole.pop(key) for key in ("default", "title", "description") if key in whole}
        word = {"type": "string", "examples": names} if name == "scheme" else {"enum": names}
        holder[name] = {"anyOf": [word, *whole.get("anyOf", [whole])], **said}
    for section, keys in _PYTHON_ONLY.items():
        for key in keys:
            del schema["$defs"][section]["properties"][key]
    del schema["$defs"]["Compute"]
    top["scheme"]["anyOf"].append({"$ref": "#/$defs/Searched"})
    schema["$defs"]["Searched"] = _searched()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "quantkit recipe", **_described(schema)}


def _searched() -> dict[str, Any]:
    """Return the schema of a scheme that is searched."""
    texts = {"type": "array", "items": {"type": "string"}}
    return {
        "type": "object",
        "required": ["budget"],
        "additionalProperties": False,
        "properties": {
            "budget": {"type": "string", "examples": ["4.25 bpw", "300 MB", "20 ms", "50 tok/s", "0.05 kl"]},
            "choices": {**texts, "minItems": 2},
            "include": {"type": "array", "items": {"enum": ["embedding", "head"]}},
            "scoring": {"type": "object"},
        },
    }


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose texts of several paragraphs are their first."""
    for part in (schema, *schema["$defs"].values()):
        if "description" in part:
            part["description"] = " ".join(part["description"].split("\n\n")[0].split())
    return schema


_TEXT = """\
# yaml-language-server: $schema={schema}
# A recipe of quantkit. What it will do, from the config alone:  quantkit plan {name}
# Do it; the same command continues an interrupted run:          quantkit run {name}
# Editors that read the first line complete and check keys:      quantkit init --schema > {schema}
model: {model}
dtype: auto                      # as the files have it; float32, bfloat16, float16

{scheme}
method: gptq                     # quantkit list names the others: rtn needs no text, gptaq and autoround take longer
# steps: [awq]                   # before: awq, smoothquant, rotate; while: bias-correction; afterwards: distill
# rules:                         # layers that get something else; the last rule that matches decides
#   - {{match: "*.mlp.down_proj", scheme: w8a16}}
#   - {{match: "model.layers.0.*", skip: true}}

# train:                         # behind the rounding, with quantkit train {name}
#   steps: 200                   # updates of 4 windows; block_steps: 50 trains every block by itself first
#   adapters: 16                 # low-rank changes in place of weights, which takes less memory
#   teacher: stored              # the float model runs once; pays where windows are seen more than once

calibration:                     # text like what the model will read
  {data}
  samples: 128                   # windows
  length: 512                    # tokens of a window

output:
  path: {out}
  format: compressed-tensors     # read by vLLM and transformers; native holds what they do not read
  # overwrite: true              # replace a checkpoint that is there

evaluate:                        # perplexity, KL to the float model, speed; leave it out to skip it
  windows: 16
  length: 512
"""

_SCHEME = """\
scheme: {scheme:24} # w4a16, w3a16-asym-g64, w8a8 ...; or a budget within which the best is searched:
# scheme:
#   budget: 4.25 bpw             # or 300 MB, 20 ms, 50 tok/s, 0.05 kl
#   choices: [w3a16-asym-g64, w4a16-asym-g64, w8a16]"""

_BUDGET = """\
scheme:                          # every layer gets what loses least within the budget
  budget: {budget}
  choices: [w3a16-asym-g64, w4a16-asym-g64, w5a16-asym-g64, w6a16-asym-g64, w8a16-g64]"""


def starter(
    model: str,
    out: str,
    *,
    scheme: str = "w4a16-asym",
    budget: str | None = None,
    data: str | None = None,
    name: str = "recipe.yaml",
) -> str:
    """Return the text of a recipe with a comment on every line, which :func:`quantkit.load_recipe` can read.

    Args:
        model: as a recipe names it.
        out: directory of the checkpoint.
        scheme: of every layer.
        budget: within which a scheme is searched for every layer, in place of ``scheme``.
        data: calibration text; None leaves the key out, commented.
        name: of the file, for the commands in it.
    """
    chosen = _SCHEME.format(scheme=_quoted(scheme)) if budget is None else _BUDGET.format(budget=_quoted(budget))
    text = "# data: texts/                 # a file, a folder, a name of datasets; default: Python's own documentation"
    return _TEXT.format(
        schema=SCHEMA_FILE,
        name=name,
        model=_quoted(model),
        scheme=chosen,
        out=_quoted(out),
        data=text if data is None else f"data: {_quoted(data)}",
    )


def _quoted(text: str) -> str:
    """Return a text as YAML reads it back."""
    import yaml

    written: str = yaml.safe_dump(text, width=10**6, allow_unicode=True)
    return written.removesuffix("\n").removesuffix("\n...")
