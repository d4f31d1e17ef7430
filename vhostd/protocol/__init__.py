"""MESSAGES. Bytes to values and back.

Promise: what leaves here as a value is well formed, and every descriptor that came along has an
owner. Pure: no I/O, no event loop, no clock; must not know rings, memory or devices.
"""
