"""HOST MEMORY. Owns the mappings of guest memory files; everyone else holds ranges.

Promise: a file is mapped once per VM, however many devices are handed it, and stays mapped for as
long as one of them uses it. Must not know messages, rings or devices.
"""
