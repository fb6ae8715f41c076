"""The form of answers in OpenAI's API: JSON, JSON of a schema, and the tools that a model may call."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Fields(BaseModel):
    """An object whose fields are all known, and of exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class JsonSchema(Fields):
    """A schema that answers must follow. They always do, whether ``strict`` is asked for or not."""

    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")] = True
    name: str = ""
    description: str = ""
    strict: bool = True


class ResponseFormat(Fields):
    """The form of answers: any text, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("format", "json_schema belongs to type json_schema, which needs it")
        return self

    @property
    def schema_of_answers(self) -> dict[str, Any] | bool | None:
        """The JSON schema of answers; None for any text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class Function(Fields):
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = True


class Tool(Fields):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """Return the tool in the form that chat templates use."""
        return {"type": "function", "function": self.function.model_dump(exclude={"strict"})}


class Named(Fields):
    """The name of a function."""

    name: str


class ChosenTool(Fields):
    """The function that the model has to call."""

    type: Literal["function"]
    function: Named
