"""Garbage collection: what nothing refers to any more, and what is past its time.

::

    collector.py   one collection at a time, on a timer and on demand, with its steps in order
    work.py        what the steps share: grace periods, the duty's fence, pages
    blobs.py       blobs that nothing refers to; uploads that never finished
    objects.py     objects that no record names
    policies.py    policies past their undelete grace period
    rollouts.py    rollout batches past their expiry
    expired.py     request ids, audit entries and usage counts past their time
    report.py      what a collection did

Every write compares the duty's fence and what it was decided on, every step may end anywhere and be repeated, and an
object is deleted only when no record can come to name it again. So a collection may be killed at any point; the next
one goes on.
"""

from __future__ import annotations

from mint_catalog.upkeep.garbage.collector import DUTY, GarbageCollector
from mint_catalog.upkeep.garbage.report import Progress, Report
from mint_catalog.upkeep.garbage.work import Grace

__all__ = ["DUTY", "GarbageCollector", "Grace", "Progress", "Report"]
