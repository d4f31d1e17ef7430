"""Benchmarks: vhostd against QEMU's built-in way and the host's own limits, in the same run."""
