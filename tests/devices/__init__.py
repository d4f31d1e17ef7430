"""Device logic without a loop, a ring or a guest."""
