"""Measures compiled models beside their peers: `python -m benchmarks`, or `make bench-cpu`."""
