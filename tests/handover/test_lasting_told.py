"""A state directory that can't be written to is told, and told no more once it can."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import trio

from tests.daemon import VhostdProcess

CONFIGURATION = "[vm.web.balloon]\nstats_interval_s = 0\n"
TIMEOUT_S = 20.0


async def set_target(daemon: VhostdProcess, target: int) -> None:
    transport = httpx.AsyncHTTPTransport(uds=str(daemon.folder / "control.sock"))
    async with httpx.AsyncClient(transport=transport, base_url="http://vhostd") as client:
        (await client.put("/v1/vms/web/balloon", json={"target": target})).raise_for_status()


async def not_lasting(daemon: VhostdProcess, *, wanted: bool) -> str | None:
    with trio.fail_after(TIMEOUT_S):
        while True:
            found: str | None = (await daemon.status("web"))["not_lasting"]
            if (found is not None) == wanted:
                return found
            await trio.sleep(0.02)


async def test_a_directory_that_went_is_told_until_it_is_back(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    async with VhostdProcess.start(
        tmp_path, CONFIGURATION, "--state-dir", str(state_dir)
    ) as daemon:
        await set_target(daemon, 4096)
        assert await not_lasting(daemon, wanted=False) is None
        shutil.rmtree(state_dir)
        await set_target(daemon, 8192)
        why = await not_lasting(daemon, wanted=True)
        assert f"{state_dir}/web.json: No such file or directory" in str(why)
        state_dir.mkdir()
        await set_target(daemon, 12288)
        await not_lasting(daemon, wanted=False)
        assert (state_dir / "web.json").exists()


async def test_one_that_can_t_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    named = str(tmp_path / "file" / "state")
    async with VhostdProcess.start(tmp_path, CONFIGURATION, "--state-dir", named) as daemon:
        assert named in str((await daemon.status("web"))["not_lasting"])
