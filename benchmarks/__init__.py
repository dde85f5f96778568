"""Speed measurements; nothing here is part of the library. Start with `python -m benchmarks.bench --help`."""
