"""Continue a prompt greedily with OpenVINO, of the IR that quantkit exports, and return its logits; see ``interop.py``."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import openvino

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}


def main() -> None:
    job = json.loads(sys.argv[1])
    begin = time.perf_counter()
    settings = {} if job["options"].get("rounded") else EXACT
    model = openvino.Core().compile_model(Path(job["path"]) / "openvino_model.xml", "CPU", settings)
    load_s = time.perf_counter() - begin
    past = {}
    for one in model.inputs:
        if one.any_name.startswith("past_key_values"):
            shape = one.partial_shape
            past[one.any_name] = np.zeros((1, shape[1].get_length(), 0, shape[3].get_length()), np.float32)
    ids, seen, tokens, logits = np.array([job["prompt"]], np.int64), 0, [], []
    for _ in range(job["tokens"]):
        seen += ids.shape[1]
        answer = model({"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64), **past})
        past = {name: answer[name.replace("past_key_values", "present")].copy() for name in past}
        logits.append(answer["logits"][0, -1].astype(np.float32))
        tokens.append(int(logits[-1].argmax()))
        ids = np.array([[tokens[-1]]], np.int64)
    version = f"openvino {openvino.__version__.split('-')[0]}"
    np.savez(job["out"], logits=np.stack(logits), tokens=np.array(tokens), load_s=load_s, version=version)


main()
