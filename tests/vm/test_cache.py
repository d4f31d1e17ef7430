"""The cache folder never passes off something half built as finished."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vm.cache import Cache, StackError

RECIPE: dict[str, object] = {"version": 1}


def _write(text: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "content").write_text(text)

    return fill


def _killed_while_building(root: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "content").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    cache = Cache(root)
    with cache.locked():
        cache.build("thing", RECIPE, fill)


def test_a_finished_component_is_found_and_not_built_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.find("thing", RECIPE) is None
    built = cache.build("thing", RECIPE, _write("first"))
    assert cache.find("thing", RECIPE) == built
    assert cache.build("thing", RECIPE, _write("second")) == built
    assert (built / "content").read_text() == "first"


def test_another_recipe_is_another_component(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.build("thing", RECIPE, _write("first"))
    assert cache.find("thing", {"version": 2}) is None
    second = cache.build("thing", {"version": 2}, _write("second"))
    assert (second / "content").read_text() == "second"


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "content").write_text("half")
        raise StackError("no more")

    with pytest.raises(StackError):
        Cache(tmp_path).build("thing", RECIPE, fill)
    assert list(tmp_path.iterdir()) == []


def test_a_build_killed_halfway_is_not_trusted_and_holds_up_no_one(tmp_path: Path) -> None:
    builder = multiprocessing.get_context("spawn").Process(
        target=_killed_while_building, args=(tmp_path,)
    )
    builder.start()
    builder.join(30)
    assert builder.exitcode == -signal.SIGKILL
    builder.close()
    cache = Cache(tmp_path)
    assert cache.find("thing", RECIPE) is None
    with cache.locked():
        built = cache.build("thing", RECIPE, _write("whole"))
    assert (built / "content").read_text() == "whole"


def test_a_folder_without_its_stamp_is_built_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    built = cache.build("thing", RECIPE, _write("first"))
    (built / "complete.json").unlink()
    cache.build("thing", RECIPE, _write("second"))
    assert (built / "content").read_text() == "second"


def test_a_cache_folder_that_cannot_be_made_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StackError, match=r"cannot create the cache folder .*/file/cache"):
        Cache(tmp_path / "file/cache")
