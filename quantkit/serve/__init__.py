"""An OpenAI-compatible server around the engine: for you, your notebook and a few colleagues.

One process, one model, one machine. A fleet (many replicas, many users, tensor parallelism, authentication and quotas) belongs
on vLLM, which reads the checkpoints quantkit writes: ``vllm serve CHECKPOINT``.

worker: the engine on a thread of its own. wire: what clients send and get. app: routes. metrics: Prometheus text.
Needs the extra ``serve`` (starlette, uvicorn).
"""
