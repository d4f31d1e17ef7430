"""Tests of vhostd/protocol: bytes in, values out."""
