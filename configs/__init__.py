"""Recipes: one per file, each with a function `get_config()`."""
