"""The shell of a VM, against real sockets."""
