"""Benchmarks: cases of every family, timed beside their peers, each behind a correctness gate. `python -m bench --help`."""
