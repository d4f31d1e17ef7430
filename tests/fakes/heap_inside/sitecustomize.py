"""Runs in the program under test, by PYTHONPATH: says how many bytes are in use when asked.

heap_meter.py is the other end. A thread of its own, so that the program's loop knows nothing of it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import socket
import sys
import threading


def _answer(listener: socket.socket) -> None:
    in_use = ctypes.CDLL(None).heap_in_use
    in_use.restype = ctypes.c_long
    asker, _ = listener.accept()
    while asker.recv(1):
        gc.collect()  # what is garbage already is no leak
        # CPython's cache of methods keeps up to 4096 names alive (Objects/typeobject.c).
        sys._clear_type_cache()
        asker.send(in_use().to_bytes(8, "little"))


def _start(path: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    threading.Thread(target=_answer, args=(listener,), daemon=True).start()


def _set(number: str) -> None:
    place, _, value = number.partition("=")
    module, _, name = place.partition(":")
    assert hasattr(importlib.import_module(module), name), place
    setattr(importlib.import_module(module), name, int(value))


if "HEAP_METER" in os.environ:
    for one in os.environ.pop("HEAP_METER_SET").split():
        _set(one)
    _start(os.environ.pop("HEAP_METER"))  # a program it starts is not measured
