"""Runs: the queue, claims, leases and what workers tell."""
