"""The catalog: MinT's memory, and the only room that talks to etcd.

It keeps policy records, adapter revisions, aliases, blob records, leases, the queue of training runs and the
registry of engine replicas; it answers CRUD, list, watch, resolve, lease, publish, promote, rollback and claim. It
never touches a tensor. ``python -m mint_catalog`` starts it.

::

    servicers/   decode, one domain call, encode          app.py    puts the parts together
    policies, revisions, aliases, blobs, base_models, leases, queue, runs, registry, evaluations: the domain
    records, run_records: its frozen dataclasses          codec, codecs: dataclass ↔ message ↔ stored bytes
    draft, requests, tables, paging, changes: transactions, request ids, tables, pages and streams over a store
    keys.py      where everything lies                    store.py  the key-value contract
    etcd.py      that contract over etcd                  watch.py  one watch loop, fanned out
    duty.py      jobs of one catalog at a time            garbage/  what nothing refers to, and what is past its time
    members.py, space.py: etcd's members one by one, defragmentation, the way back from a full database
"""

from __future__ import annotations

__all__: list[str] = []
