"""Measured comparisons; may import everything, nothing imports it."""
