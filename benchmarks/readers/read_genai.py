"""Continue a prompt greedily with onnxruntime-genai and return its logits; see ``interop.py``."""

import importlib.metadata
import json
import sys
import time

import numpy as np
import onnxruntime_genai


def main() -> None:
    job = json.loads(sys.argv[1])
    begin = time.perf_counter()
    model = onnxruntime_genai.Model(job["path"])
    load_s = time.perf_counter() - begin
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(job["prompt"]) + job["tokens"], do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array([job["prompt"]], np.int32))
    tokens, logits = [], []
    for _ in range(job["tokens"]):
        logits.append(np.array(generator.get_logits(), np.float32).reshape(-1, generator.get_logits().shape[-1])[-1])
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    version = f"onnxruntime-genai {importlib.metadata.version('onnxruntime-genai')}"
    np.savez(job["out"], logits=np.stack(logits), tokens=np.array(tokens), load_s=load_s, version=version)


main()
