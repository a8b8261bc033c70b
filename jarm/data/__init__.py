"""Data in: benchmarks and tables of responses, and the pairs they span."""
