"""vhostd: guest memory of QEMU/KVM hosts, managed outside the VMM.

The way of a message, each folder with one promise and one prohibition:

* transport/  SOCKET BYTES. Exact reads and writes with descriptors; knows no message type.
* protocol/   MESSAGES. Bytes to values and back; pure, does no I/O.
* session/    ONE CONNECTION'S NEGOTIATION. Message to state to actions; pure, performs none.
* devices/    DEVICE LOGIC. Chains and wishes to effects; pure, touches no guest memory.
* backend/    SHELL of one VM. Performs actions and effects; decides nothing.
* memory/     HOST MEMORY. Owns mappings; knows no ring.
* images/     DISK IMAGES. Opened, locked, created, their page cache; knows no VMM.
* _native/    NATIVE. The only package that sees cffi; the worker thread and the rings in C.

Beside the way: control/ (HTTP API and vhostctl), metrics/, daemon.py (the one nursery),
supervision.py (each VM by itself: served, or paused with a reason), config.py.
"""

__version__ = "0.1.0"
