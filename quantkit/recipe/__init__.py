"""Recipes: YAML files that say what to quantize, how, and what to measure afterwards."""
