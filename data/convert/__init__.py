"""Converters from the layouts that people actually download."""
