"""Measurements of speed and closeness, no part of the library. Start with `python -m benchmarks.bench --help`."""
