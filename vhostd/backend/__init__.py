"""SHELL of one VM. Joins transport, session, device, memory and the native worker.

Promise: performs what session/ and devices/ ask for, one action at a time. Must not decide anything
about the protocol or a device itself.
"""
