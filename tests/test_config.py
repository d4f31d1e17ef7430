"""The configuration file: the contract's own example, every mistake named, nothing guessed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vhostd.__main__ import main
from vhostd.config import Config, MetricsConfig, VmConfig, load
from vhostd.config_devices import BalloonConfig, MemConfig, PmemConfig
from vhostd.errors import ConfigError
from vhostd.units import GiB

EXAMPLE = """
[daemon]
runtime_dir = "/run/vhostd"
state_dir   = "/var/lib/vhostd"
log_format  = "json"
[metrics]
listen = "127.0.0.1:9713"
[vm.web]
qmp = "/run/qemu/web.qmp"
[vm.web.balloon]
socket = "web-balloon.sock"
free_page_reporting = true
free_page_hinting = true
deflate_on_oom = true
stats_interval_s = 5
"""
MEM = """
[[vm.web.mem]]
id = "mem0"
socket = "web-mem0.sock"
window_address = 0x240000000
size = "16GiB"
block_size = "2MiB"
requested_size = "0"
node = 0
"""
PMEM = """
[[vm.web.pmem]]
id = "disk0"
socket = "web-disk0.sock"
file = "/var/lib/images/disk0.img"
size = "4GiB"
mode = "shmem"
readonly = false
"""
SHORT = "[vm.web.balloon]\n"

Mistakes = Callable[[str], list[str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "vhostd.toml"


@pytest.fixture
def mistakes(file: Path) -> Mistakes:
    def of(text: str) -> list[str]:
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load(file)
        prefix = f"{file}: "
        assert str(caught.value) == "\n".join(caught.value.mistakes)
        assert all(line.startswith(prefix) and "\n" not in line for line in caught.value.mistakes)
        return [line.removeprefix(prefix) for line in caught.value.mistakes]

    return of


def test_the_contracts_example_is_read_as_written(file: Path) -> None:
    file.write_text(EXAMPLE)
    assert load(file) == Config(
        runtime_dir=Path("/run/vhostd"),
        state_dir=Path("/var/lib/vhostd"),
        state_dir_named=True,
        log_format="json",
        metrics=MetricsConfig("127.0.0.1", 9713),
        vms={
            "web": VmConfig(
                "web",
                Path("/run/qemu/web.qmp"),
                BalloonConfig(Path("/run/vhostd/web-balloon.sock")),
            )
        },
    )


def test_everything_but_the_device_has_a_default(file: Path) -> None:
    file.write_text(SHORT)
    config = load(file)
    assert config.runtime_dir == Path("/run/vhostd")
    assert (config.log_format, config.metrics, config.vms["web"].qmp) == (None, None, None)
    balloon = config.vms["web"].balloon
    assert balloon is not None
    assert balloon.socket == Path("/run/vhostd/web-balloon.sock")
    assert balloon.stats_interval_s == 5
    assert balloon.free_page_reporting
    assert balloon.packed


def test_the_command_lines_directories_win_and_move_the_sockets(file: Path) -> None:
    file.write_text(EXAMPLE)
    config = load(file, runtime_dir=Path("/tmp/r"), state_dir=Path("here"))
    assert config.runtime_dir == Path("/tmp/r")
    assert config.state_dir == Path.cwd() / "here"
    balloon = config.vms["web"].balloon
    assert balloon is not None
    assert balloon.socket == Path("/tmp/r/web-balloon.sock")
    assert config.control_socket == Path("/tmp/r/control.sock")


def test_all_mistakes_are_named_at_once(mistakes: Mistakes) -> None:
    found = mistakes(
        EXAMPLE.replace("free_page_reporting", "free_page_reportin")
        .replace("stats_interval_s = 5", 'stats_interval_s = "5"')
        .replace('"json"', '"xml"')
    )
    assert found == [
        "daemon.log_format: 'xml' is not one of json, console",
        "vm.web.balloon.stats_interval_s: '5' is wrong; write a number",
        "vm.web.balloon.free_page_reportin: unknown key; did you mean free_page_reporting?",
    ]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("", "vm: no VM is described; write a table such as [vm.web.balloon]"),
        ("[vm.web]", "vm.web: has no device; write a table [vm.web.balloon]"),
        (SHORT + "deflate_on_oom = 1", "deflate_on_oom: 1 is wrong; write true or false"),
        (SHORT + "stats_interval_s = 0.05", "0.05 is out of range"),
        (SHORT + "stats_interval_s = -1", "-1 is out of range"),
        (SHORT + "stats_interval_s = nan", "is not a finite number"),
        (SHORT + f"stats_interval_s = 1{'0' * 400}", "is not a finite number"),
        (SHORT + 'socket = "../x"', "'../x' is no path below /run/vhostd"),
        (SHORT + 'socket = ""', "'' is no path below /run/vhostd"),
        (SHORT + 'socket = "control.sock"', "is taken by the control socket; name another"),
        (SHORT + f'socket = "{"s" * 96}"', "has 108 bytes, a socket's path may have 107"),
        (SHORT + '[vm.db.balloon]\nsocket="web-balloon.sock"', "is taken by vm.web.balloon"),
        (SHORT + '[vm.db.balloon]\nsocket="./web-balloon.sock"', "is taken by vm.web.balloon"),
        ('[vm."../../etc".balloon]', "vm.../../etc: a VM's name is 1 to 64"),
        ('[vm."".balloon]', "a VM's name is 1 to 64"),
        ('[vm."a\\nb".balloon]', "a VM's name is 1 to 64"),
        (f"[vm.{'n' * 65}.balloon]", "a VM's name is 1 to 64"),
        ("vm = 3", "vm: is no table; write [vm]"),
        ("[vm]\nweb = 3", "vm.web: is no table; write [vm.web]"),
        ("[vm.web]\nballoon = []", "vm.web.balloon: is no table; write [vm.web.balloon]"),
        ("[vm.web.mem]\nid='a'", "vm.web.mem: is no array of tables; write [[vm.web.mem]]"),
        (SHORT + '[vm.web]\nqmp = "x.qmp"', "'x.qmp' is not an absolute path"),
        (SHORT + '[metrics]\nlisten = "localhost:1"', "is no address; write one such as"),
        (SHORT + '[metrics]\nlisten = "127.0.0.1:65536"', "is no address; write one such as"),
        (SHORT + '[metrics]\nlisten = "127.0.0.1"', "is no address; write one such as"),
        (SHORT + "[daemon]\nlog_formt = 'json'", "did you mean log_format?"),
        (SHORT + "[daemons]", "daemons: unknown key; did you mean daemon?"),
        (SHORT + "[x]", "x: unknown key; known are daemon, metrics, vm"),
    ],
)
def test_a_mistake_says_where_what_and_what_to_write(
    mistakes: Mistakes, text: str, mistake: str
) -> None:
    assert any(mistake in line for line in mistakes(text)), mistakes(text)


def test_other_listen_addresses(file: Path) -> None:
    file.write_text(SHORT + '[metrics]\nlisten = "[::1]:0"')
    assert load(file).metrics == MetricsConfig("::1", 0)


def test_the_contracts_other_devices_are_read_as_written(file: Path) -> None:
    file.write_text(EXAMPLE + MEM + PMEM)
    vm = load(file).vms["web"]
    assert vm.mems == (
        MemConfig("mem0", Path("/run/vhostd/web-mem0.sock"), 0x2_4000_0000, 16 * GiB),
    )
    image = Path("/var/lib/images/disk0.img")
    assert vm.pmems == (PmemConfig("disk0", Path("/run/vhostd/web-disk0.sock"), image, 4 * GiB),)
    assert vm.sockets == [
        Path(f"/run/vhostd/web-{name}.sock") for name in ("balloon", "mem0", "disk0")
    ]


def test_an_image_is_shared_by_those_who_only_read_it(file: Path, mistakes: Mistakes) -> None:
    other = PMEM.replace("web", "db")
    line = (
        "vm.db: /var/lib/images/disk0.img is the image of vm.web.pmem disk0 and vm.db.pmem disk0;"
        " only read-only devices may share one"
    )
    assert mistakes(EXAMPLE + PMEM + other) == [line]
    assert mistakes(EXAMPLE + PMEM.replace("false", "true") + other) == [line]
    file.write_text(EXAMPLE + (PMEM + other).replace("false", "true"))
    assert [vm.pmems[0].readonly for vm in load(file).vms.values()] == [True, True]


def test_windows_of_one_vm_lie_apart_whatever_they_are_for(mistakes: Mistakes) -> None:
    window = PMEM.replace('"shmem"', '"window"') + "window_address = 0x240000000\n"
    (line,) = mistakes(EXAMPLE + MEM + window)
    assert "pmem[0].window_address" in line and "overlap the window of mem0" in line


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        ('"16GiB"', '"16GiX"', "mem[0].size: '16GiX' is not a size"),
        ('"16GiB"', "true", 'mem[0].size: True is no size; write bytes or text such as "16GiB"'),
        ('"16GiB"', "-2097152", "mem[0].size: -2097152 is negative"),
        ('"16GiB"', "2097153", "mem[0].size: 2097153 must be a multiple of 2097152"),
        ('"2MiB"', '"3MiB"', "mem[0].block_size: 3145728 must be a power of two"),
        ('"0"', '"32GiB"', "mem[0].requested_size: 34359738368 is more than size"),
        ("0x240000000", "0x240000001", "mem[0].window_address: 0x240000001 must be a multiple"),
        ("window_address", "window_adress", "did you mean window_address?"),
        ("window_address", "window_adress", "mem[0].window_address: is missing"),
        ("node = 0", "node = 0.5", "mem[0].node: 0.5 is no NUMA node"),
        ("mem0", "disk0", "pmem[0].id: 'disk0' is used twice in this VM"),
        ('"mem0"', '"a b"', "mem[0].id: 'a b' is no name"),
        ("web-mem0.sock", "web-disk0.sock", "web-disk0.sock is taken by vm.web.mem[0]"),
        ('"shmem"', '"window"', "pmem[0].window_address: is missing"),
        ('"shmem"', '"dax"', "'dax' is not one of shmem, window"),
        ('mode = "shmem"', "window_address = 0x240000000", "means nothing with mode"),
        ('"/var/lib/images/disk0.img"', '"disk0.img"', "'disk0.img' is not an absolute path"),
        ('"4GiB"', '"4097M"', "pmem[0].size: 4296015872 must be a multiple of 2097152"),
        ('"shmem"', '"shmem"\ncold_cache_s = 0.5', "pmem[0].cold_cache_s: 0.5 is out of range"),
        ('"shmem"', '"shmem"\nreadahead = "fast"', "'fast' is not one of normal, sequential"),
        ('"shmem"', '"shmem"\nwriteback_limit = "x"', "pmem[0].writeback_limit: 'x' is not a"),
    ],
)
def test_their_tables_are_checked_all_the_same(
    mistakes: Mistakes, old: str, new: str, mistake: str
) -> None:
    text = EXAMPLE + MEM + PMEM
    assert old in text
    found = mistakes(text.replace(old, new))
    assert any(mistake in line for line in found), found


@pytest.mark.parametrize(
    ("content", "mistake"),
    [
        (b"[vm", "is not TOML"),
        (b"a = '\xff'", "byte 5 is not UTF-8"),
        (b"a = " + b"9" * 5000, "holds a value"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_toml_is_one_mistake(file: Path, content: bytes, mistake: str) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=mistake) as caught:
        load(file)
    assert len(caught.value.mistakes) == 1


def test_a_file_that_cannot_be_read_is_one_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: can't be read: No such file"):
        load(tmp_path / "absent.toml")


VALUES = st.recursive(
    st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from(['"x"', '""', '"1G"', '"/p"', "nan", "inf", "0.5", "1979-05-27", '"\\n"']),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=4,
)
KEY_NAMES = """
daemon runtime_dir metrics listen vm web balloon socket mem pmem id size mode file node
window_address stats_interval_s packed qmp
"""
KEYS = st.sampled_from(KEY_NAMES.split())


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(inner) for inner in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


TABLES = st.recursive(
    st.dictionaries(KEYS, VALUES, max_size=3),
    lambda inner: st.dictionaries(
        KEYS, inner | VALUES | st.lists(inner, min_size=1, max_size=2), max_size=4
    ),
    max_leaves=12,
)


@given(TABLES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_toml_is_a_configuration_or_a_list_of_one_line_mistakes(
    file: Path, table: dict[str, object]
) -> None:
    file.write_text("\n".join(f"{key} = {toml(value)}" for key, value in table.items()))
    try:
        config = load(file)
    except ConfigError as error:
        assert error.mistakes
        assert all("\n" not in line for line in error.mistakes)
    else:
        assert config.vms


def test_what_no_vmm_is_given_is_loaded_and_refused_by_check_config(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VMs of the file are served: one of them may have such a disk from an earlier release."""
    file.write_text(EXAMPLE + PMEM.replace('"4GiB"', '"3GiB"'))
    (refusal,) = load(file).refusals
    assert refusal.startswith(f"{file}: vm.web.pmem[0].size: 3221225472 is no power of two")
    monkeypatch.setattr(sys, "argv", ["vhostd", "check-config", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == refusal + "\n"


def test_mistakes_and_refusals_are_told_together(mistakes: Mistakes) -> None:
    found = mistakes(EXAMPLE + PMEM.replace('"4GiB"', '"3GiB"') + "nonsense = 1\n")
    assert ["pmem[0].nonsense" in found[0], "no power of two" in found[1]] == [True, True]


def test_a_window_has_any_size(file: Path) -> None:
    window = PMEM.replace('"shmem"', '"window"') + "window_address = 0x240000000\n"
    file.write_text(EXAMPLE + window.replace('"4GiB"', '"3GiB"'))
    assert load(file).refusals == ()
