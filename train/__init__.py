"""Training: the loop, exact resume, recipes. Installed as `vlm.train`."""
