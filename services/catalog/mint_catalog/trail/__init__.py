"""What was done and what was used: the audit trail and the usage counters."""
