"""The loader room: one process per node, beside one engine, that brings adapters nearer to it.

Tiers: object store → node disk → engine host pool → slot. ``cache`` is the node disk. ``loading`` goes the way through
the tiers; ``scheduler`` lets callers of one adapter share it, ``gate`` has tenants take turns on it, ``waits`` measures
it. ``tickets`` are loads nobody waits for. Who submits them: clients; ``wishes`` for promotions that wait; ``prefetch``
for moved aliases and publications of policies ``served`` here; ``pins`` for what stays (in ``pin_store``).
``node`` is all of it, for ``service``. The loader is told what to load by digest; which revision an alias means is none
of its business, except for what it is asked to pin.
"""
