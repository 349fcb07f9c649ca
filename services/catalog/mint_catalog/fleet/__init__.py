"""Verbs over many policies, and a tenant's erasure."""
