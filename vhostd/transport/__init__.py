"""SOCKET BYTES. Exact reads and writes with descriptors, on trio.

Promise: nothing is read beyond one message, and no descriptor a peer sends is ever lost or leaked.
Must not know what a message means, nor what was negotiated.
"""
