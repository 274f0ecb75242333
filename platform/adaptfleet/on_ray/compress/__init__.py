"""Recipes of compression: `compression.run_compression` takes a contract to a measured, published checkpoint."""
