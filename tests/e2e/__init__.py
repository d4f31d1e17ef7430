"""Real guests in the real QEMU, served by the real daemon."""
