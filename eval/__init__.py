"""How good is a reward: metrics, the benchmark, its tables and its figures."""
