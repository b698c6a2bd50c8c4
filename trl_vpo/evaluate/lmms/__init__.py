"""Public benchmarks, run by lmms-eval."""
