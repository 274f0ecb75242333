"""A package, so that pytest ends the endpoint after its last test."""
