"""KEEPER. Our own small service manager, for hosts without systemd.

Promise: what the daemon puts into the fd store outlives it. However it dies, a successor is started
at once with the same descriptors, so that no VMM sees a connection end. It speaks the very protocol
of systemd (sd_notify(3), sd_listen_fds(3)): the daemon knows one mechanism, not two.

It must stay up when all else fails, so it must not know what a descriptor is for, never maps guest
memory, has one thread, and imports nothing but the standard library.
"""
