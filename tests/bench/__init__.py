"""Measurements, run by hand and once a release: `python -m tests.bench.cpu`. None of them asserts a time."""
