"""What `tools/benchmark.py` measures, a file each."""

MACHINE = ("cpu", "cpu_class", "cores", "python")  # what of a device outlasts a measurement
