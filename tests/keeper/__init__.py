"""The keeper: real processes that die in every way, and what their successors get."""
