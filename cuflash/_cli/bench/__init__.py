"""Benchmarks: what is measured (cells, sweeps), how (timing, gpu, cpu), against whom (contenders)."""
