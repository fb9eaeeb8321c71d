"""Benchmarks of trained architectures: how well do training-free metrics rank them? Each is a module with `HELP`,
`add_arguments`, `run`, `text` and `pictures`."""

BENCHES = {"nas-bench-bert": "lmnas.bench.nas_bench_bert"}
"""Name -> module."""
