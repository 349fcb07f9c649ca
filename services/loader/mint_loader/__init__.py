"""The loader room: one process per node, beside one engine, that brings adapters nearer to it.

Tiers: object store → node disk → engine host pool → slot. ``cache`` is the node disk, ``scheduler`` lets callers
share and order work, ``loading`` goes the way through the tiers, ``tickets`` are loads nobody waits for, ``prefetch``
follows moved aliases. The loader is told what to load by digest; which revision an alias means is none of its
business.
"""
