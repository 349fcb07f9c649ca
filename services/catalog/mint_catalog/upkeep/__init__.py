"""What a catalog does by itself and for its operator: ticks, compaction, space, backup, garbage."""
