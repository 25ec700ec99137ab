"""What `tools/benchmark.py` measures, a file each."""
