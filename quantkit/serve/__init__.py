"""A small server with OpenAI's API around the engine, for one model and a few users.

It is one process on one machine. For many users, several replicas, tensor parallelism, accounts or quotas, use vLLM, which
reads the checkpoints that quantkit writes: ``vllm serve CHECKPOINT``.

The modules: worker (runs the engine on a thread of its own), wire (formats of requests and responses), app (routes), metrics
(for Prometheus), run (creates and runs a server). Needs the extra ``serve`` (starlette, uvicorn).
"""
