"""Shipped recipes, one YAML file each: ``paper``, ``default``, ``small``."""
