"""What several benchmarks need: processes, timing, and the report."""
