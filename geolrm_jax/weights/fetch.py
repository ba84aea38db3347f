"""Known public weights: where they lie, under which licence, and a download that can be resumed and is verified.

Nothing but the standard library's urllib is used, so proxies are set as usual (`https_proxy`).
"""

import dataclasses
import http.client
import re
import urllib.error
import urllib.request
from pathlib import Path

from geolrm_jax.runtime import logging
from geolrm_jax.weights.files import sha256_of

TIMEOUT = 30.0  # seconds without a byte
MEGABYTE = 1_000_000
AGENT = {"User-Agent": "geolrm-jax"}


@dataclasses.dataclass(frozen=True)
class PublicFile:
    """One file of the table.

    Attributes:
      url: where it is published.
      name: of the file on disk.
      licence: of the weights, in a word.
      sha256: in hexadecimal; None where the server is asked, as Hugging Face answers with size and digest.
      size: in bytes, None where the server is asked.
    """

    url: str
    name: str
    licence: str
    sha256: str | None = None
    size: int | None = None


def _hugging_face(repository: str, file: str, name: str, licence: str) -> PublicFile:
    return PublicFile(f"https://huggingface.co/{repository}/resolve/main/{file}", name, licence)


def _meta(model: str, file: str, sha256: str, size: int | None = None) -> PublicFile:
    url = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_{model}/{file}"
    return PublicFile(url, file, "Apache-2.0", sha256, size)


# Written without a network. The addresses are those that the projects' own READMEs, hubconf and metadata name. Who
# vouches for a digest: Hugging Face's server (None here); for VGG16 its first 8 digits are in torchvision's file name,
# for the heads it is the file in the `lpips` package; Meta publishes none, those of its files are on record in many
# projects that pin them, all in agreement.
FILES = {
    **{
        f"dinov2-{size}": _hugging_face(
            f"facebook/dinov2-{size}", "model.safetensors", f"dinov2-{size}.safetensors", "Apache-2.0"
        )
        for kind in ("", "with-registers-")
        for size in (f"{kind}small", f"{kind}base", f"{kind}large")
    },
    "dinov2-small-pth": _meta(
        "vits14",
        "dinov2_vits14_pretrain.pth",
        "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
        88_283_115,
    ),
    "dinov2-base-pth": _meta(
        "vitb14",
        "dinov2_vitb14_pretrain.pth",
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
        346_378_731,
    ),
    "dinov2-large-pth": _meta(
        "vitl14",
        "dinov2_vitl14_pretrain.pth",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        1_217_586_395,
    ),
    "dinov2-with-registers-small-pth": _meta(
        "vits14",
        "dinov2_vits14_reg4_pretrain.pth",
        "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    ),
    "dinov2-with-registers-base-pth": _meta(
        "vitb14",
        "dinov2_vitb14_reg4_pretrain.pth",
        "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
        346_393_545,
    ),
    "dinov2-with-registers-large-pth": _meta(
        "vitl14",
        "dinov2_vitl14_reg4_pretrain.pth",
        "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51",
        1_217_607_321,
    ),
    "vgg16": PublicFile(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "vgg16-397923af.pth",
        "BSD-3-Clause",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        553_433_881,
    ),
    "lpips-heads": PublicFile(
        "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
        "lpips-vgg-v0.1.pth",
        "BSD-2-Clause",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        7_289,
    ),
    # The address of the authors' README; neither it nor their repository states a licence.
    "geolrm": _hugging_face("LinShan/GeoLRM", "geolrm.ckpt", "geolrm.ckpt", "not stated"),
}


def fetch(name: str, directory: Path | str) -> Path:
    """Brings one of `FILES` into `directory`, verified by size and SHA-256, and returns its path.

    A download goes to `NAME.part`, is resumed from there, by this call or a later one, and takes its name once
    verified. A part that does not match is removed: no resuming could mend it. A file that is there already is
    verified and kept; where only a server that cannot be reached knows its digest, a warning says so.

    Raises:
      ValueError: if the name is not known, or size or digest are not as published.
      OSError: if the server cannot be reached or refuses: the message says what to download and where to put it.
    """
    if name not in FILES:
        raise ValueError(f"no public file is called {name!r}: expected one of {', '.join(FILES)}")
    file = FILES[name]
    path = Path(directory) / file.name
    if path.exists():
        _keep(path, file)
        return path
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        expected = _published(file)
        _download(file.url, part)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(_by_hand(file, path, part, error)) from error
    try:
        digest = _verify(part, file.url, expected)
    except ValueError:
        part.unlink()
        raise
    part.rename(path)
    vouched = "as published" if expected.sha256 else "which nobody publishes for comparison"
    logging.notice(f"{path}: SHA-256 {digest}, {vouched}; licence of the weights: {file.licence}")
    return path


@dataclasses.dataclass(frozen=True)
class Published:
    """What is known of the whole file."""

    size: int | None
    sha256: str | None


def _keep(path: Path, file: PublicFile) -> None:
    """Verifies a file that is there already."""
    try:
        expected = _published(file)
    except (OSError, http.client.HTTPException) as error:
        logging.warn(f"{path}: kept, but not verified: {file.url} cannot be asked for its digest ({error})")
        return
    try:
        digest = _verify(path, file.url, expected)
    except ValueError as error:
        raise ValueError(f"{error}; remove the file to download it again") from None
    logging.notice(f"{path}: already there, SHA-256 {digest}")


def _verify(path: Path, url: str, expected: Published) -> str:
    """The file's SHA-256, if size and digest are as expected, else a ValueError."""
    size = path.stat().st_size
    if expected.size not in (None, size):
        raise ValueError(f"{path}: {size} bytes, but {url} has {expected.size}")
    digest = sha256_of(path)
    if expected.sha256 not in (None, digest):
        raise ValueError(f"{path}: SHA-256 is {digest}, but that of {url} is {expected.sha256}")
    return digest


def _by_hand(file: PublicFile, path: Path, part: Path, error: Exception) -> str:
    reason = (
        f"the server answers {error}" if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
    )
    kept = f" ({part} keeps the first {_size(part)} bytes for another try)" if _size(part) else ""
    return f"cannot download {file.url}: {reason}{kept}; or download it elsewhere and put it at {path.resolve()}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _LinkedHeaders(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps their headers: Hugging Face says size and digest where it sends to its storage."""

    def __init__(self):
        self.seen: dict[str, str] = {}

    def redirect_request(self, request, response, code, message, headers, address):
        self.seen |= {key.lower(): value for key, value in headers.items()}
        following = super().redirect_request(request, response, code, message, headers, address)
        following.method = request.get_method()  # older versions of urllib would turn HEAD into GET
        return following


def _published(file: PublicFile) -> Published:
    """Size and digest as the table has them, or as the server tells them."""
    if file.sha256:
        return Published(file.size, file.sha256)
    linked = _LinkedHeaders()
    request = urllib.request.Request(file.url, method="HEAD", headers=AGENT)
    with urllib.request.build_opener(linked).open(request, timeout=TIMEOUT) as response:
        headers = linked.seen | {key.lower(): value for key, value in response.headers.items()}
    size = headers.get("x-linked-size") or headers.get("content-length")
    etag = re.fullmatch('(?:W/)?"([0-9a-f]{64})"', headers.get("x-linked-etag", ""))
    return Published(int(size) if size else None, etag and etag[1])


def _download(url: str, part: Path) -> None:
    """Writes what `part` still lacks, and goes on after a cut as long as every attempt brings more than was there."""
    while True:
        before = _size(part)
        try:
            return _download_rest(url, part)
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as error:
            if _size(part) <= before:
                raise
            logging.notice(f"{url}: {error}; going on from byte {_size(part)}")


def _download_rest(url: str, part: Path) -> None:
    """One request for what is missing, appended to `part`; for all of it from a server that does not know ranges.

    Raises:
      OSError, http.client.HTTPException: if the connection fails or ends early; what came is in `part`.
    """
    start = _size(part)
    request = urllib.request.Request(url, headers=AGENT | ({"Range": f"bytes={start}-"} if start else {}))
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if start and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is left to send; whether the part is the file, its size and digest tell
        raise
    with response:
        start = start if response.status == http.client.PARTIAL_CONTENT else 0
        total = start + int(response.headers.get("Content-Length", 0))
        with (
            part.open("ab" if start else "wb") as out,
            logging.progress(part.stem, total // MEGABYTE, start=start // MEGABYTE, unit="MB") as bar,
        ):
            while block := response.read(MEGABYTE):
                out.write(block)
                bar.update(out.tell() // MEGABYTE)
    if _size(part) < total:
        raise ConnectionError(f"the connection ended after {_size(part)} of {total} bytes")
