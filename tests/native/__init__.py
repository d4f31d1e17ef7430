"""Tests of the native core through its Python doors: real memory files, eventfds and sockets."""
