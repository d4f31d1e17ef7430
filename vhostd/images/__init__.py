"""DISK IMAGES. Files that are a guest's persistent memory: opened, locked, created, their cache.

Promise: an image that another program writes is never opened, and what is wrong with one is said
on one line. Must not know VMMs, rings or devices. Every call may block as long as storage likes.
"""
