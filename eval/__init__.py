"""Evaluation: tasks, metrics, controls, intervals. Installed as `vlm.eval`."""
