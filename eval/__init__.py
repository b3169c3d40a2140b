"""Benchmarks: tasks, official metrics, controls, statistics and reports."""
