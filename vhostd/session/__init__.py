"""ONE CONNECTION'S NEGOTIATION. A message and the state in, actions and the next state out.

Promise: a message that is refused leaves the state exactly as it was. Pure: performs no action
itself; must not know sockets, mappings, the native worker, or what a device does with its queues.
"""
