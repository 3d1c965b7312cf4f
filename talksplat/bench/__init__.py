"""Benchmarks: each prints a table and writes ``{"machine", "commit", "rows": [...]}`` as JSON."""
