"""One VM's trouble is its own: whatever fails in one, the others do not notice."""
