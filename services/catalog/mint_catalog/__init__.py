"""The catalog: MinT's memory, and the only room that talks to etcd.

It keeps policy records, adapter revisions, aliases, blob records, leases, the queue of training runs and the
registry of engine replicas; it answers CRUD, list, watch, resolve, lease, publish, promote, rollback and claim. It
never touches a tensor. ``python -m mint_catalog`` starts it.

::

    app.py       puts the parts together                  settings.py  what can be set
    servicers/   decode, one domain call, encode
    model/       records, the keys they lie under, how they are written down
    storage/     the key-value contract, etcd behind it; transactions, pages, watches, duties over it
    policies/    heads and their bulk creation, revisions, blobs, evaluations, rollouts
    serving/     aliases with canaries and gates, resolution and its cache, engine replicas
    work/        runs: recipes, queue, claims, leases, reports
    trail/       audit trail, usage counters, and when both expire
    upkeep/      ticks, compaction, space in etcd, backup and restore, garbage collection
    fleet/       verbs over many policies, a tenant's erasure
"""

from __future__ import annotations

__all__: list[str] = []
