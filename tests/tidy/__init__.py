"""House rules that a machine can check: sizes, import arrows, no leftovers."""
