"""What ``scripts/bench_ops.py`` is made of: tables, their measurement, chains, and how results are shown."""
