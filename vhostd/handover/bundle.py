"""A bundle: the descriptors of one VM parked in the queue of one socket, as one stored descriptor.

A service manager's store has room for some ten thousand descriptors and 128 KiB of their names; a
VM has fifty. A packet in a UNIX socket's queue holds 253 of them (SCM_RIGHTS, unix(7)), and lives
as long as somebody has the socket open. A bundle is never changed: a new one takes its place, so a
reader finds the one or the other, whole, whenever its writer died. It is read without being taken
out (MSG_PEEK), so a reader that dies leaves it as it was.

Sockets stay outside: the kernel's collector of unreachable sockets would look at each of those at
every close of any UNIX socket of the host. So do files on storage that may hang, whose close can
take for ever. Must not know what a descriptor is for.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Sequence
from contextlib import closing
from typing import Final

import msgspec

from vhostd.fds import OwnedFd
from vhostd.handover.state_memfd import StateDamaged, StateVersionUnknown

VERSION: Final = 1

FDS_PER_PACKET: Final = 250
"""Below SCM_MAX_FD, include/net/scm.h."""

MANIFEST_SIZE_MAX: Final = 1 << 17
"""Bytes; a few hundred descriptors need some 20 KiB."""

_SO_PEEK_OFF: Final = 42  # include/uapi/asm-generic/socket.h; Python names it from 3.12 on
_FILLER: Final = b"-"


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A descriptor that is kept.

    Attributes:
        role: "device/role", what it is to its VM.
        identity: of the open file; the same for the same, as far as anybody can tell.
        stored: its own name in the manager's store; empty: it is in the bundle.
    """

    role: str
    identity: str
    stored: str = ""


class Manifest(msgspec.Struct, frozen=True):
    """What a bundle says of itself.

    Attributes:
        number: the highest of a VM's bundles counts.
        entries: those in the bundle are in the order of its descriptors.
    """

    version: int
    vm: str
    number: int
    entries: list[Entry]


class BundleVersionUnknown(StateVersionUnknown):
    """A bundle of a release that we cannot read.

    Attributes:
        vm: whose it is.
    """

    def __init__(self, vm: str, version: int) -> None:
        super().__init__(f"what is kept of {vm}: version {version}, this release reads {VERSION}")
        self.vm = vm


class _Head(msgspec.Struct):
    version: int
    vm: str


def pack(manifest: Manifest, fds: Sequence[int]) -> OwnedFd:
    """Make a bundle; fds stay the caller's.

    Raises:
        OSError: no descriptors or memory for it; ETOOMANYREFS: more descriptors are under way in
            sockets of this user than it may have open files.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    with closing(ours):
        try:
            theirs.setblocking(False)
            ours.setblocking(False)
            words = msgspec.msgpack.encode(manifest)
            for start in range(0, max(1, len(fds)), FDS_PER_PACKET):
                rights = array.array("i", fds[start : start + FDS_PER_PACKET])
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
                ours.sendmsg([words if start == 0 else _FILLER], ancillary)
        except OSError:
            theirs.close()
            raise
    return OwnedFd(theirs.detach())


def read_manifest(fd: int) -> Manifest:
    """What a bundle says of itself.

    Raises:
        StateDamaged, StateVersionUnknown: it is none, or another release's.
        OSError: no descriptors or memory.
    """
    manifest, fds = peek(fd, with_fds=False)
    assert not fds, "none were asked for"
    return manifest


def peek(fd: int, *, with_fds: bool = True) -> tuple[Manifest, list[OwnedFd]]:
    """What is in a bundle, which stays as it is; the descriptors are the caller's.

    Raises:
        StateDamaged, StateVersionUnknown: it is none, or another release's.
        OSError: no descriptors or memory.
    """
    found: list[OwnedFd] = []
    with socket.socket(fileno=os.dup(fd)) as bundle:
        bundle.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
        words = b""
        while True:
            packet, fds = _peek_packet(bundle, with_fds=with_fds)
            found += fds
            if not packet:
                break
            words = words or packet
            if not with_fds:
                break
    manifest = _decode(words)
    inside = sum(not entry.stored for entry in manifest.entries)
    if with_fds and inside != len(found):
        raise StateDamaged(f"bundle of {manifest.vm}: {len(found)} descriptors, not {inside}")
    return manifest, found


def _peek_packet(bundle: socket.socket, *, with_fds: bool) -> tuple[bytes, list[OwnedFd]]:
    room = socket.CMSG_SPACE(FDS_PER_PACKET * array.array("i").itemsize) if with_fds else 0
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    try:
        packet, ancillary, told, _ = bundle.recvmsg(MANIFEST_SIZE_MAX, room, flags)
    except BlockingIOError:
        return b"", []
    fds = []
    for _, _, data in ancillary:
        numbers = array.array("i")
        numbers.frombytes(data)
        fds += [OwnedFd(number) for number in numbers]
    if with_fds and told & socket.MSG_CTRUNC:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return packet, fds


def _decode(words: bytes) -> Manifest:
    try:
        head = msgspec.msgpack.decode(words, type=_Head)
        if head.version != VERSION:
            raise BundleVersionUnknown(head.vm, head.version)
        return msgspec.msgpack.decode(words, type=Manifest)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise StateDamaged(f"not a bundle of descriptors: {error}") from error
