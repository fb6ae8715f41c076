"""Continue a prompt greedily with onnxruntime, keys and values handed on, and return its logits; see ``interop.py``."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime


def main() -> None:
    job = json.loads(sys.argv[1])
    path, begin = Path(job["path"]), time.perf_counter()
    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    load_s = time.perf_counter() - begin
    decoder = json.loads((path / "genai_config.json").read_text())["model"]["decoder"]
    names = [one.name for one in session.get_inputs() if one.name.startswith("past_key_values")]
    past = {name: np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32) for name in names}
    ids, seen, tokens, logits = np.array([job["prompt"]], np.int64), 0, [], []
    for _ in range(job["tokens"]):
        seen += ids.shape[1]
        answer = session.run(None, {"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64), **past})
        past = dict(zip(names, answer[1:], strict=True))
        logits.append(answer[0][0, -1].astype(np.float32))
        tokens.append(int(logits[-1].argmax()))
        ids = np.array([[tokens[-1]]], np.int64)
    version = f"onnxruntime {onnxruntime.__version__}"
    np.savez(job["out"], logits=np.stack(logits), tokens=np.array(tokens), load_s=load_s, version=version)


main()
