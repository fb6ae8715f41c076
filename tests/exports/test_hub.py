"""Checkpoints on the hub, against a server of this machine that answers as the hub does."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.errors import FormatError, QuantkitError


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for when a folder is uploaded; files and questions are kept."""

    status = 200
    files: dict[str, bytes]
    asked: list[tuple[str, str]]

    def log_message(self, *arguments):
        """Print nothing."""

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        size = int(self.headers.get("Content-Length", 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
        else:
            body = self.rfile.read(size)
        self.asked.append((self.path, self.headers.get("Authorization", "")))
        if self.status != 200:
            self.answer(self.status, {"error": "no right to write"})
        elif self.path.endswith("/repos/create"):
            self.answer(200, {"url": "https://huggingface.co/me/tiny"})
        elif "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            self.answer(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(200, {"commitUrl": "https://huggingface.co/me/tiny/commit/1", "commitOid": "1", "success": True})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def do_GET(self):
        self.asked.append((self.path, self.headers.get("Authorization", "")))
        self.answer(200, {"id": "me/tiny", "sha": "0" * 40, "siblings": []})


@pytest.fixture
def hub(monkeypatch):
    kind = type("Hub", (Hub,), {"files": {}, "asked": [], "status": 200})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for place in ("constants", "hf_api", "_commit_api"):
        monkeypatch.setattr(f"huggingface_hub.{place}.ENDPOINT", url, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_standin")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield kind
    server.shutdown()
    server.server_close()


def test_a_checkpoint_is_uploaded_whole_and_nothing_else_is(hub, tiny_quantized, tmp_path):
    path = tmp_path / "q"
    quantkit.save(quantkit.load(tiny_quantized), path)
    (path / ".quantkit.lock").write_text("{}")
    (path / "notes").mkdir()
    (path / "notes" / ".secret").write_text("no")
    done = CliRunner().invoke(app, ["push", str(path), "me/tiny"])
    assert done.exit_code == 0, done.output
    assert "https://huggingface.co/me/tiny/commit/1" in done.stdout
    kept = {one.name for one in path.iterdir() if one.is_file() and not one.name.startswith(".")}
    assert {"config.json", "model.safetensors", "README.md"} <= kept
    assert hub.files == {name: (path / name).read_bytes() for name in kept}
    assert {
        token for path, token in hub.asked if "tiny" in path
    }  # transformers asks for things of its own, too == {"Bearer hf_standin"}


def test_what_is_damaged_or_unfinished_is_not_uploaded(hub, tiny_quantized, tmp_path):
    path = tmp_path / "q"
    quantkit.save(quantkit.load(tiny_quantized), path)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(FormatError):
        quantkit.push_to_hub(path, "me/tiny")
    with pytest.raises(QuantkitError):
        quantkit.push_to_hub(tmp_path / "nothing", "me/tiny")
    with pytest.raises(QuantkitError, match="owner/name"):
        quantkit.push_to_hub(tiny_quantized, "tiny")
    assert not hub.asked


@pytest.mark.parametrize(("status", "said"), [(401, "hf auth login"), (403, "may write"), (500, "try again later")])
def test_what_the_hub_refuses_is_one_message(hub, tiny_quantized, monkeypatch, status, said):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.status = status
    with pytest.raises(QuantkitError, match=said) as error:
        quantkit.push_to_hub(tiny_quantized, "me/tiny")
    assert str(status) in str(error.value)


def test_without_a_network_it_says_so(tiny_quantized, monkeypatch):
    def fail(*arguments, **options):
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    with pytest.raises(QuantkitError, match="cannot be reached: Name or service not known"):
        quantkit.push_to_hub(tiny_quantized, "me/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(QuantkitError, match="HF_HUB_OFFLINE"):
        quantkit.push_to_hub(tiny_quantized, "me/tiny")
