"""Sweeps and studies: many recipes, run through the same store."""
