"""A real systemd with the shipped unit, and a real guest whose fsync is looked at all the time."""
