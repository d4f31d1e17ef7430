"""The VM stack: real QEMU, real kernels, fetched without root, driven from trio.

stack.py prepares everything once into a cache folder; guest.py boots guests out of it.
Nothing in here knows vhostd itself: it starts virtual machines and talks to what runs inside.
"""
