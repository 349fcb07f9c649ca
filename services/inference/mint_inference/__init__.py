"""The inference room: generation and scores for clients, by alias or revision; no torch, nothing durable.

``resolver`` (over ``alias_cache``) tells what a name means, ``router`` chooses the engine replica, ``generation`` goes
the way of one request: resolve, choose, ask the engine, have the adapter loaded where the engine lacks it, relay. A
stream belongs to the revision its header names; neither the base nor another revision ever answers instead.
"""
