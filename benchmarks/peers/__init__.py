"""The peers of benchmarks/against_peers.py: an environment of their own, their model files, one module for each."""
