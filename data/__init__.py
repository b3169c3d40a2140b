"""Data sets: one schema, readers, converters. Installed as `vlm.data`."""
