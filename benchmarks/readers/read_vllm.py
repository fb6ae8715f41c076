"""Continue a prompt with vLLM; what it is asked and what it answers: ``benchmarks/interop.py``."""

import json
import sys
import time

import numpy as np
import vllm
from vllm import LLM, SamplingParams, TokensPrompt


def main(job: dict) -> None:
    """Answer one job."""
    started = time.perf_counter()
    llm = LLM(
        job["path"],
        dtype=job["dtype"],
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        trust_remote_code=False,
    )
    load_s = time.perf_counter() - started
    sampling = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True, logprobs=-1)
    found = llm.generate([TokensPrompt(prompt_token_ids=job["prompt"])], sampling)[0].outputs[0]
    logits = [[step[i].logprob for i in range(len(step))] for step in found.logprobs]
    np.savez(
        job["out"],
        logits=np.array(logits, np.float32),
        tokens=found.token_ids,
        load_s=load_s,
        version=f"vllm {vllm.__version__}",
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
