"""Metric modules that `evaluate.load` takes by path."""
