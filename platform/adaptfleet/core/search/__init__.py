"""The mathematics of a search for several objectives: fronts, hypervolumes, and what each axis counts for."""
