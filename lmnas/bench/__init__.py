"""Published benchmarks, each a module with HELP, add_arguments, run, text and pictures."""

BENCHES = {"nas-bench-nlp": "lmnas.bench.nas_bench_nlp", "nas-bench-bert": "lmnas.bench.nas_bench_bert"}
