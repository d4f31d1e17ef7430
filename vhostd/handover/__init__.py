"""HANDOVER. What one daemon leaves to the next, beside the descriptors themselves.

Promise: a successor reads either what its predecessor committed last, whole, or is told that it
cannot; never a mixture. Must not know what the state says, nor who keeps the descriptors.
"""
