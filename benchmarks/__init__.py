"""Benchmarks: `python -m benchmarks.NAME [--quick] [--json FILE]`; they use the public API only."""
