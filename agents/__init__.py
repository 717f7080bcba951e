"""Agents that learn from a reward: run from the checkout, `python -m agents.train`."""
