"""Tests of vhostd/transport: real sockets and descriptors."""
