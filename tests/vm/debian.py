"""Debian packages without root: an apt configuration of our own, and dpkg -x.

The mirrors are the host's own: every field of its Debian source (address, keyring, options) is
taken over, only the suites are ours. The host's apt settings (proxy, credentials) stay in force;
its hooks do not run and nothing outside the given folder is written.
This file must not know what the packages are for.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from tests.vm.cache import StackError

Paragraph = dict[str, str]

ARCHITECTURE = "amd64"
_SUITE = re.compile(
    r"(?:buster|bullseye|bookworm|trixie|forky|duke|sid"
    r"|stable|oldstable|oldoldstable|testing|unstable)"
    r"(?P<part>-security|-updates|-proposed-updates|-backports)?(?:/updates)?"
)
_ADVICE = (
    "the test guests (QEMU >= 11.1, kernels, busybox) come as Debian packages: "
    "install Debian 12 or later, for instance in a container"
)
# Options of a one-line source whose deb822 name is not simply the capitalised option.
_OPTION_FIELDS = {"arch": "Architectures", "lang": "Languages", "target": "Targets"}


def parse_paragraphs(text: str) -> Iterator[Paragraph]:
    """Parse deb822 text: paragraphs of `Field: value`, continuation lines kept with newlines."""
    paragraph: Paragraph = {}
    field = ""
    for line in [*text.splitlines(), ""]:
        if not line.strip():
            if paragraph:
                yield paragraph
            paragraph, field = {}, ""
        elif line.startswith("#"):
            continue
        elif line[0] in " \t":
            if field:
                paragraph[field] += "\n" + line
        else:
            name, _, value = line.partition(":")
            field = name.strip().title()
            paragraph[field] = value.strip()


def _parse_one_line(line: str) -> Paragraph | None:
    match = re.match(r"\s*deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<rest>[^#]+)", line)
    if match is None:
        return None
    words = match["rest"].split()
    if len(words) < 3:
        return None
    paragraph = {
        "Types": "deb",
        "Uris": words[0],
        "Suites": words[1],
        "Components": " ".join(words[2:]),
    }
    for option in (match["options"] or "").split():
        name, _, value = option.partition("=")
        paragraph[_OPTION_FIELDS.get(name, name.title())] = value.replace(",", " ")
    return paragraph


def _read_sources(etc: Path) -> list[Paragraph]:
    paragraphs: list[Paragraph] = []
    for file in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if not file.is_file():
            continue
        text = file.read_text(errors="replace")
        if file.suffix == ".sources":
            paragraphs += parse_paragraphs(text)
        elif file.suffix == ".list":
            paragraphs += filter(None, map(_parse_one_line, text.splitlines()))
    return paragraphs


def _trust(paragraph: Paragraph) -> int | None:
    """How surely a source is Debian itself: lower is surer, None is somebody else's."""
    signed_by = paragraph.get("Signed-By", "")
    if "debian-archive" in signed_by:
        return 0
    path = urlsplit(paragraph["Uris"].split()[0]).path
    looks_right = "debian" in path
    if not signed_by:
        return 1 if looks_right else None
    # A company mirror may carry Debian under a key of its own.
    return 2 if looks_right else None


def host_sources(etc: Path = Path("/etc/apt")) -> tuple[Paragraph, Paragraph | None]:
    """The host's Debian archive and, where it has one, its security archive.

    Raises StackError where the host has no Debian source at all.
    """
    found: dict[bool, list[tuple[int, Paragraph]]] = {False: [], True: []}
    for paragraph in _read_sources(etc):
        usable = (
            "deb" in paragraph.get("Types", "").split()
            and "main" in paragraph.get("Components", "").split()
            and paragraph.get("Enabled", "yes").lower() not in ("no", "false", "0")
            and paragraph.get("Uris", "cdrom:").split()[0].split(":")[0] != "cdrom"
        )
        suites = [_SUITE.fullmatch(suite) for suite in paragraph.get("Suites", "").split()]
        if not usable or not suites or None in suites:
            continue
        trust = _trust(paragraph)
        if trust is not None:
            secure = any(m is not None and m["part"] == "-security" for m in suites)
            found[secure].append((trust, paragraph))
    # min() keeps the first of equals: the order apt itself reads them in.
    archive, security = (
        min(found[part], key=lambda pair: pair[0], default=(0, None))[1] for part in (False, True)
    )
    if archive is None:
        raise StackError(f"no Debian package source in {etc}: {_ADVICE}")
    return archive, security


def _stanza(source: Paragraph, suites: Sequence[str]) -> str:
    fields = {
        name: value
        for name, value in source.items()
        if name not in ("Architectures", "Languages", "Targets", "Pdiffs", "Enabled")
    }
    fields |= {"Types": "deb", "Suites": " ".join(suites), "Components": "main"}
    return "".join(f"{name}: {value}\n" for name, value in fields.items()) + "\n"


_CONFIGURATION = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
#clear APT::Default-Release;
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "{folder}/sources.list.d";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State "{folder}/state";
Dir::State::Lists "{folder}/state/lists";
Dir::State::status "{folder}/state/status";
Dir::State::extended_states "{folder}/state/extended_states";
Dir::Cache "{folder}/cache";
Dir::Cache::Archives "{folder}/cache/archives";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
Dir::Log "{folder}/log";
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Sandbox::User "{user}";
APT::Update::Error-Mode "any";
APT::Get::List-Cleanup "true";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
"""


class Archive:
    """One Debian release as seen through an apt configuration of its own, in `folder`.

    What is in `folder` is apt's: it checks signatures and hashes itself, so an interrupted
    download is resumed there, never trusted.
    """

    def __init__(self, folder: Path, release: str, etc: Path = Path("/etc/apt")) -> None:
        for program in ("apt-get", "apt-cache", "dpkg-deb"):
            if shutil.which(program) is None:
                raise StackError(f"{program} is missing: {_ADVICE}")
        self.release = release
        self.folder = folder
        archive, security = host_sources(etc)
        self.address = archive["Uris"].split()[0]
        suites = [release] if release == "bookworm" else [release, f"{release}-backports"]
        sources = _stanza(archive, suites)
        if security is not None:
            sources += _stanza(security, [f"{release}-security"])
        for name in ("sources.list.d", "state/lists/partial", "cache/archives/partial", "log"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "sources.list.d/debian.sources").write_text(sources)
        (folder / "state/status").touch()
        # apt as root downloads as user _apt, who need not be able to enter this folder.
        text = _CONFIGURATION.format(folder=folder, architecture=ARCHITECTURE, user="root")
        (folder / "apt.conf").write_text(text)

    def _run(self, program: str, *arguments: str) -> str:
        command = [program, "-c", str(self.folder / "apt.conf"), "-q", *arguments]
        environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        result = subprocess.run(
            command,
            cwd=self.folder / "cache/archives",
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if result.returncode != 0:
            raise StackError(self._explain(program, arguments, result.stdout + result.stderr))
        return result.stdout

    def _explain(self, program: str, arguments: Sequence[str], output: str) -> str:
        lines = [line.strip() for line in output.splitlines()]
        errors = [line for line in lines if re.match(r"[EW]: ", line)]
        text = errors[0][3:] if errors else (lines[-1] if lines else "no output")
        network = re.search(
            r"Temporary failure resolving|Could not (?:connect|resolve)|Cannot initiate|timed out"
            r"|Network is unreachable|Unable to connect",
            output,
        )
        if network:
            return f"cannot reach the Debian mirror {self.address} ({network[0]}): {text}"
        if "NO_PUBKEY" in output:
            text += ": install the newest debian-archive-keyring"
        return f"{program} {arguments[0]} failed for {self.release}: {text}"

    def update(self) -> None:
        """Fetch the release's package indexes. Raises StackError, naming the mirror."""
        self._run("apt-get", "update")

    def versions(self, package: str) -> list[Paragraph]:
        """The index entries of every version of `package`, newest first; empty if unknown."""
        try:
            text = self._run("apt-cache", "show", package)
        except StackError:
            # apt-cache exits 100 for a name it does not know: to be asked about is no failure.
            known = self._run("apt-cache", "pkgnames", package).split()
            if package in known:
                raise
            return []
        return list(parse_paragraphs(text))

    def record(self, package: str, version: str) -> Paragraph:
        """The index entry of one version of `package`. Raises StackError if there is none."""
        text = self._run("apt-cache", "show", f"{package}={version}")
        return next(parse_paragraphs(text))

    def _downloaded(self) -> list[Path]:
        return sorted((self.folder / "cache/archives").glob("*.deb"))

    def discard_downloads(self) -> None:
        """Forget the downloaded packages: they have been unpacked."""
        for package in self._downloaded():
            package.unlink()

    def download_with_dependencies(self, packages: Iterable[str], suite: str) -> list[Path]:
        """Download `packages`, preferably from `suite`, with all they need to run: .deb paths."""
        self._run(
            "apt-get", "install", "--download-only", "--yes", "--target-release", suite, *packages
        )
        return self._downloaded()

    def download(self, packages: Iterable[tuple[str, str]]) -> list[Path]:
        """Download exactly these (package, version) pairs and nothing else: .deb paths."""
        self._run("apt-get", "download", *(f"{name}={version}" for name, version in packages))
        return self._downloaded()


def unpack(packages: Iterable[Path], destination: Path) -> None:
    """Extract `packages` below `destination`; no maintainer script runs. Raises StackError."""
    for package in packages:
        result = subprocess.run(
            ["dpkg-deb", "--extract", package, destination],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise StackError(f"cannot unpack {package.name}: {result.stderr.strip()}")
