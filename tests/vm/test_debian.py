"""Which mirror and which kernel are chosen from what a host says; no network in here."""

from pathlib import Path

import pytest

from tests.vm import kernels
from tests.vm.cache import StackError
from tests.vm.debian import Archive, host_sources

DEB822 = """\
Types: deb
# a remark
URIs: https://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: https://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
INLINE_KEY = """\
Types: deb deb-src
URIs: http://mirror.example/company/debian
Suites: trixie
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mDMEYCQjIxYJKwYBBAHaRw8BAQdA
 -----END PGP PUBLIC KEY BLOCK-----
"""


def _etc(folder: Path, **files: str) -> Path:
    (folder / "sources.list.d").mkdir()
    for name, text in files.items():
        place = "sources.list" if name == "main" else f"sources.list.d/{name.replace('_', '.')}"
        (folder / place).write_text(text)
    return folder


def test_deb822_sources_give_archive_and_security(tmp_path: Path) -> None:
    archive, security = host_sources(_etc(tmp_path, debian_sources=DEB822))
    assert archive["Uris"] == "https://mirror.example/debian"
    assert archive["Signed-By"] == "/usr/share/keyrings/debian-archive-keyring.gpg"
    assert security is not None
    assert security["Uris"] == "https://mirror.example/debian-security"


def test_one_line_sources_keep_their_options(tmp_path: Path) -> None:
    options = "[arch=amd64,i386 signed-by=/etc/k.gpg check-valid-until=no]"
    line = f"deb {options} http://m/debian trixie main # remark\n"
    archive, security = host_sources(
        _etc(tmp_path, main="# old\ndeb-src http://m/debian trixie main\n" + line)
    )
    assert archive["Uris"] == "http://m/debian"
    assert (archive["Signed-By"], archive["Check-Valid-Until"]) == ("/etc/k.gpg", "no")
    assert security is None


def test_other_peoples_repositories_are_never_taken_for_debian(tmp_path: Path) -> None:
    etc = _etc(
        tmp_path,
        docker_list="deb [signed-by=/d.gpg] https://docker.example/linux/debian bookworm stable\n",
        hashi_list="deb [signed-by=/h.gpg] https://apt.hashi.example bookworm main\n",
        llvm_list="deb https://apt.llvm.example/bookworm llvm-toolchain-bookworm main\n",
        off_sources=DEB822.replace("Types:", "Enabled: no\nTypes:"),
        backup_save=DEB822,
    )
    with pytest.raises(StackError, match=r"no Debian package source in .*: .* install Debian 12"):
        host_sources(etc)


def test_a_source_under_debians_own_key_comes_first(tmp_path: Path) -> None:
    etc = _etc(tmp_path, main="deb http://first/debian bookworm main\n", z_sources=DEB822)
    assert host_sources(etc)[0]["Uris"] == "https://mirror.example/debian"


def test_the_apt_folder_asks_the_hosts_mirror_for_our_suites_under_its_key(tmp_path: Path) -> None:
    etc = tmp_path / "etc"
    etc.mkdir()
    Archive(tmp_path / "apt", "trixie", _etc(etc, debian_sources=INLINE_KEY))
    written = (tmp_path / "apt/sources.list.d/debian.sources").read_text()
    assert "Suites: trixie trixie-backports\n" in written
    assert "Types: deb\n" in written
    assert "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mDME" in written


@pytest.mark.parametrize(
    ("version", "series", "belongs"),
    [
        ("6.12.107-1", "6.12", True),
        ("6.12.107-1", "6.1", False),
        ("6.1.176-1", "6.1", True),
        ("7.2.12-1~bpo13+1", "7", True),
        ("7.2.12-1~bpo13+1", "7.2", True),
        ("6.12.107-1", "7", False),
    ],
)
def test_a_kernel_version_belongs_to_its_series_only(
    version: str, series: str, belongs: bool
) -> None:
    assert kernels.belongs(version, series) is belongs


def test_modules_bring_what_they_depend_on(tmp_path: Path) -> None:
    drivers = tmp_path / "library/kernel/drivers"
    drivers.mkdir(parents=True)
    for name, depends in (("top", "mid-dle,low"), ("mid-dle", "low"), ("low", ""), ("else", "")):
        (drivers / f"{name}.ko").write_bytes(
            b"\x7fELF\0license=GPL\0depends=%s\0" % depends.encode()
        )
    kernels.keep_modules(tmp_path / "library", tmp_path / "kept", ("top", "absent"))
    assert (tmp_path / "kept/modules.dep").read_text() == (
        "low.ko:\nmid_dle.ko: low.ko\ntop.ko: mid_dle.ko low.ko\n"
    )
    assert not (tmp_path / "kept/else.ko").exists()
