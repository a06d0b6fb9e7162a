"""Benchmarks of the whole system under load; `python -m bench` or `make bench`."""
