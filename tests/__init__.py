"""The tests of vhostd."""
