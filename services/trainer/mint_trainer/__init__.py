"""The trainer: one resident base model in torch, many LoRA policies on it, the step API over gRPC.

Domain modules (``base``, ``adapters``, ``batch``, ``losses``, ``optimizer``, ``session``, ``state``) know torch and
nothing of asyncio or gRPC; ``worker`` and ``sessions`` bring the steps of all sessions onto one torch thread in
order; ``service`` and ``__main__`` are the process around them.
"""
