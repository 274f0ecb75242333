"""Base models: `embedded` makes the one that the project brings along, `loading` reads any of them."""
