"""NATIVE. The only package that sees cffi: typed doors to c_src/.

Promise: every call is one call of c_src/vhd_api.h, with its types and its errors as OSError. Must
not know messages or device logic.
"""

from vhostd._native.device import Device
from vhostd._native.image import Image, process_cool, process_page_out
from vhostd._native.memory import FileIdentity, Log, Mapping, Region, identify_file
from vhostd._native.values import (
    BalloonCounters,
    BalloonFlag,
    Chain,
    Event,
    Fault,
    Handler,
    ImageCache,
    ImageStatistics,
    PmemCounters,
    RingFeature,
    RingPosition,
    RingSetup,
    RingStatistics,
)
from vhostd._native.worker import Worker

__all__ = [
    "BalloonCounters",
    "BalloonFlag",
    "Chain",
    "Device",
    "Event",
    "Fault",
    "FileIdentity",
    "Handler",
    "Image",
    "ImageCache",
    "ImageStatistics",
    "Log",
    "Mapping",
    "PmemCounters",
    "Region",
    "RingFeature",
    "RingPosition",
    "RingSetup",
    "RingStatistics",
    "Worker",
    "identify_file",
    "process_cool",
    "process_page_out",
]
