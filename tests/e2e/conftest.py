"""The stack, fetched once, and a daemon with one guest on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.daemon import VhostdProcess
from tests.vm.guest import Guest, balloon_device, boot
from tests.vm.stack import Stack, ensure

KERNELS = ("6.1", "6.12", "7")
VM = "web"
BALLOON_SOCKET = "web-balloon.sock"


@dataclass(frozen=True)
class Served:
    """A guest whose balloon the daemon serves as VM "web"."""

    daemon: VhostdProcess
    guest: Guest

    async def balloon(self) -> dict[str, int]:
        """The balloon part of its status."""
        balloon: dict[str, int] = (await self.daemon.status(VM))["balloon"]
        return balloon


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture(scope="session")
def stack() -> Stack:
    """QEMU and all guest kernels; fetched on the first run ever."""
    return ensure(KERNELS)


@pytest.fixture
def serve(stack: Stack, tmp_path: Path) -> Serve:
    """serve(kernel="6.12", options="...", **boot arguments) starts daemon and guest."""

    @asynccontextmanager
    async def start(
        kernel: str = "6.12",
        options: str = "",
        modprobe: tuple[str, ...] = ("virtio_balloon",),
        append: str = "",
    ) -> AsyncIterator[Served]:
        configuration = f'[vm.{VM}.balloon]\nsocket = "{BALLOON_SOCKET}"\n{options}\n'
        async with (
            VhostdProcess.start(tmp_path, configuration) as daemon,
            boot(
                stack,
                kernel=kernel,
                memory="1G",
                devices=balloon_device(tmp_path / BALLOON_SOCKET),
                modprobe=modprobe,
                append=append,
            ) as guest,
        ):
            yield Served(daemon, guest)

    return start
