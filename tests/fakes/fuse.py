"""A file system of a VMM's own, which stops answering: mount, one file, silence.

Speaks the protocol of /dev/fuse, linux/fuse.h, as far as one file needs it. Whoever waits for an
answer can't be killed until HungFile ends. Meanwhile this process may neither close the file nor
start another program: that would close it, too.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.fakes.memory import MIB

SIZE = 64 * MIB

GETATTR, FLUSH = 3, 25  # FUSE_GETATTR is fstat(2), FUSE_FLUSH is a part of close(2)

_HEADER = struct.Struct("=IIQQIIIHH")  # struct fuse_in_header
_ANSWER = struct.Struct("=IiQ")  # struct fuse_out_header
_INIT = struct.Struct("=IIIIHHIIHHI28x")  # struct fuse_init_out
_ATTRIBUTES = struct.Struct("=QQQQQQIIIIIIIIII")  # struct fuse_attr
_ENTRY = struct.Struct("=QQQQII")  # struct fuse_entry_out, before its attributes
_ATTRIBUTES_VALID = struct.Struct("=QII")  # struct fuse_attr_out, before its attributes
_OPENED = struct.Struct("=QIi")  # struct fuse_open_out

_LOOKUP, _FORGET, _OPEN, _INIT_REQUEST, _INTERRUPT, _BATCH_FORGET = 1, 2, 14, 26, 36, 42
_UNANSWERED = {_FORGET, _INTERRUPT, _BATCH_FORGET}
_ROOT, _FILE = 1, 2
_REQUEST_SIZE_MAX = MIB + 4096
_MS_NOSUID_NODEV = 2 | 4
_MNT_FORCE, _MNT_DETACH = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


class HungFile:
    """The one file of a file system that answers nothing any more.

    Attributes:
        fd: the file, open for reading and writing.
    """

    def __init__(self, device: int, folder: Path) -> None:
        """Serve the file system that is mounted at folder until the file is open."""
        self._device = device
        self._folder = folder
        self._silent = threading.Event()
        self._asked: list[int] = []
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self.fd = os.open(folder / "file", os.O_RDWR | os.O_CLOEXEC)
        self._silent.set()

    def wait_asked(self, opcode: int, timeout_s: float = 5.0) -> None:
        """Wait until somebody waits for an answer to this."""
        with self._news:
            assert self._news.wait_for(lambda: opcode in self._asked, timeout_s), "never asked"

    @property
    def asked(self) -> list[int]:
        """Opcodes of requests that were never answered, in order."""
        with self._news:
            return list(self._asked)

    def end_storage(self) -> None:
        """Whoever waits gets an error: the file system is gone."""
        _libc.umount2(str(self._folder).encode(), _MNT_FORCE)  # busy, but aborted
        self._thread.join()

    def end(self) -> None:
        """Have nothing left of it."""
        self.end_storage()
        os.close(self._device)
        with suppress(OSError):  # what the file system had to say to it
            os.close(self.fd)
        _libc.umount2(str(self._folder).encode(), _MNT_DETACH)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, _REQUEST_SIZE_MAX)
            except OSError:  # it was aborted
                return
            _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
            if opcode in _UNANSWERED:
                continue
            if self._silent.is_set():
                with self._news:
                    self._asked.append(opcode)
                    self._news.notify_all()
                continue
            content = self._answer(opcode, node)
            code = 0 if content is not None else -errno.ENOSYS
            answer = content or b""
            os.write(self._device, _ANSWER.pack(_ANSWER.size + len(answer), code, unique) + answer)

    def _answer(self, opcode: int, node: int) -> bytes | None:
        if opcode == _INIT_REQUEST:
            return _INIT.pack(7, 31, 0, 0, 16, 12, 4096, 1, 0, 0, 0)
        if opcode == _LOOKUP:
            return _ENTRY.pack(_FILE, 0, 0, 0, 0, 0) + _attributes(_FILE)
        if opcode == GETATTR:
            return _ATTRIBUTES_VALID.pack(0, 0, 0) + _attributes(node)
        if opcode == _OPEN:
            return _OPENED.pack(1, 0, 0)
        return None


def _attributes(node: int) -> bytes:
    mode = stat.S_IFREG | 0o666 if node == _FILE else stat.S_IFDIR | 0o755
    size = SIZE if node == _FILE else 0
    return _ATTRIBUTES.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


@contextmanager
def hung_file() -> Iterator[HungFile]:
    """A file whose file system answers nothing; skips the test where none can be mounted."""
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"/dev/fuse: {error.strerror}")
    with tempfile.TemporaryDirectory() as name:
        options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
        if _libc.mount(b"hung", name.encode(), b"fuse", _MS_NOSUID_NODEV, options.encode()) != 0:
            os.close(device)
            pytest.skip(f"mount of a FUSE: {os.strerror(ctypes.get_errno())}")
        file = HungFile(device, Path(name))
        try:
            yield file
        finally:
            file.end()
