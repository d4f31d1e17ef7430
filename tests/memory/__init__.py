"""The memory room: guest memory files and what is none, on real files."""
