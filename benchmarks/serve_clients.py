"""Try clients of others against a server: langchain-openai's calls, and schemathesis with the server's own description.

    python -m venv peers && peers/bin/pip install langchain-openai schemathesis
    python benchmarks/serve_clients.py --model demo --python peers/bin/python --examples 50

The model has to have a chat template that knows tools for the last of langchain's calls, which is left out otherwise, and said.
Exits with 1 if a call fails, an answer has not the form that was asked for, or schemathesis finds a fault.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CALLS = '''
import sys

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

url, name = sys.argv[1:]
chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=name, temperature=0, max_tokens=96, max_retries=0)


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


answer = chat.invoke([("system", "Be brief."), ("human", "Say hello.")])
assert answer.content and answer.usage_metadata["output_tokens"] > 0, answer
print("invoke:", repr(answer.content[:60]))
pieces = [piece.content for piece in chat.stream("Say hello.")]
assert len(pieces) > 2
print("stream:", len(pieces), "pieces")
several = chat.batch(["Name a colour.", "Name a fruit."])
assert len(several) == 2 and all(one.content for one in several)
print("batch:", len(several), "answers")
asked = chat.bind(logprobs=True, top_logprobs=2, stop=["zzz"], seed=5).invoke("Say hello.")
assert len(asked.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
print("bind: log probabilities, stop, seed")
for method in ("json_schema", "json_mode"):
    try:
        person = chat.with_structured_output(Person, method=method, include_raw=True).invoke("Ann is 30. As JSON: name, age.")
    except Exception as error:
        raise SystemExit(f"with_structured_output({method}): {error}")
    if method == "json_schema":
        assert isinstance(person["parsed"], Person), person
    print(f"with_structured_output, {method}:", person["parsed"], "" if person["parsing_error"] is None else "(another form)")
try:
    called = chat.bind_tools([add], tool_choice="add").invoke("What is 2 and 3?")
except Exception as error:
    if "chat template knows no tools" not in str(error):
        raise
    print("bind_tools: left out, the model's chat template knows no tools")
else:
    assert called.tool_calls[0]["name"] == "add" and set(called.tool_calls[0]["args"]) == {"a", "b"}, called
    print("bind_tools:", called.tool_calls[0]["args"])
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--python", default=sys.executable, help="of the environment that has the clients")
    parser.add_argument("--examples", type=int, default=50, help="of schemathesis, for each operation")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--only", choices=("langchain", "schemathesis"))
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "quantkit", "serve", arguments.model, "--port", "0", "--context", str(arguments.context)]
    server = subprocess.Popen([*command, "--name", "served"], stdout=subprocess.PIPE, text=True)
    codes = []
    try:
        assert server.stdout is not None
        url = next(found[0] for line in server.stdout if (found := re.findall(r"http://[\d.]+:\d+", line)))
        if arguments.only != "schemathesis":
            codes.append(subprocess.run([arguments.python, "-c", CALLS, url, "served"], check=False).returncode)
        if arguments.only != "langchain":
            # 256 answers that fill the context are a valid request, and minutes of work
            limits = ["--max-examples", str(arguments.examples), "--request-timeout", "900", "--workers", "1"]
            run = [
                str(Path(arguments.python).absolute()),
                "-m",
                "schemathesis.cli",
                "run",
                f"{url}/openapi.json",
                "--phases",
                "examples,coverage,fuzzing",
            ]
            with tempfile.TemporaryDirectory() as place:  # which it fills with what it finds
                codes.append(subprocess.run([*run, *limits], check=False, cwd=place).returncode)
    finally:
        server.terminate()
        server.wait(30)
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
