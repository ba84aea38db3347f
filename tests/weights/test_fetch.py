"""Downloads from a server on this machine that can cut the line, forget ranges, redirect and lie."""

import dataclasses
import hashlib
import http.server
import threading

import numpy as np
import pytest

from geolrm_jax.weights.fetch import FILES, PublicFile, fetch

CONTENT = np.random.default_rng(0).bytes(3_300_000)
SIZE = len(CONTENT)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@dataclasses.dataclass
class Behaviour:
    """What the server does, and the requests it got as (method, path, Range)."""

    ranges: bool = True
    cut: int | None = None
    linked: dict[str, str] | None = None
    content: bytes = CONTENT
    requests: list[tuple[str, str, str | None]] = dataclasses.field(default_factory=list)

    @property
    def asked(self):
        return [wanted for method, _, wanted in self.requests if method == "GET"]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        behaviour = self.server.behaviour
        wanted = self.headers["Range"]
        behaviour.requests.append((self.command, self.path, wanted))
        if self.path == "/linked":
            self.send_response(302)
            for name, value in ({"Location": "/file", "Content-Length": "0"} | behaviour.linked).items():
                self.send_header(name, value)
            return self.end_headers()
        if self.path != "/file":
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and behaviour.ranges else 0
        if start >= len(behaviour.content):
            return self.send_error(416)
        body = behaviour.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: behaviour.cut])
        return None

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A running server; `site.add(path, …)` puts an address of it into the table under the name "x"."""
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.behaviour = Behaviour()
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()

    def add(path="/file", sha256=DIGEST, size=SIZE):
        url = f"http://127.0.0.1:{running.server_port}{path}"
        monkeypatch.setitem(FILES, "x", PublicFile(url, "x.bin", "none", sha256, size))
        return url

    running.add = add
    yield running
    running.shutdown()
    running.server_close()


def test_download_is_verified_and_takes_its_name(server, tmp_path):
    server.add()
    path = fetch("x", tmp_path / "new")
    assert path == tmp_path / "new" / "x.bin" and path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"] and server.behaviour.asked == [None]


def test_a_cut_connection_is_resumed_where_it_ended(server, tmp_path):
    server.add()
    server.behaviour.cut = 1_250_000
    assert fetch("x", tmp_path).read_bytes() == CONTENT
    assert server.behaviour.asked == [None, "bytes=1250000-", "bytes=2500000-"]


def test_a_part_of_an_earlier_call_is_resumed(server, tmp_path):
    server.add()
    (tmp_path / "x.bin.part").write_bytes(CONTENT[:1000])
    assert fetch("x", tmp_path).read_bytes() == CONTENT
    assert server.behaviour.asked == ["bytes=1000-"] and not (tmp_path / "x.bin.part").exists()


def test_a_part_that_is_already_whole_only_gets_its_name(server, tmp_path):
    server.add()
    (tmp_path / "x.bin.part").write_bytes(CONTENT)
    assert fetch("x", tmp_path).read_bytes() == CONTENT
    assert server.behaviour.asked == [f"bytes={SIZE}-"]


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server.add()
    server.behaviour.ranges = False
    (tmp_path / "x.bin.part").write_bytes(b"anything" * 100)
    assert fetch("x", tmp_path).read_bytes() == CONTENT


def test_a_line_that_brings_nothing_more_ends_in_an_error_that_keeps_the_part(server, tmp_path):
    server.add()
    server.behaviour.ranges, server.behaviour.cut = False, 2000
    with pytest.raises(OSError, match=r"x\.bin\.part keeps the first 2000 bytes") as caught:
        fetch("x", tmp_path)
    assert str(tmp_path / "x.bin") in str(caught.value)
    assert (tmp_path / "x.bin.part").read_bytes() == CONTENT[:2000]


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"size": 17}])
def test_what_is_not_as_published_is_refused_and_removed(server, tmp_path, wrong):
    server.add(**wrong)
    with pytest.raises(ValueError, match=f"SHA-256 is {DIGEST}.*0000" if "sha256" in wrong else "3300000 bytes.*17"):
        fetch("x", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_verified_without_a_server(tmp_path, monkeypatch):
    monkeypatch.setitem(FILES, "x", PublicFile("http://127.0.0.1:9/x", "x.bin", "none", DIGEST, SIZE))
    (tmp_path / "x.bin").write_bytes(CONTENT)
    assert fetch("x", tmp_path) == tmp_path / "x.bin"
    (tmp_path / "x.bin").write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(ValueError, match=r"SHA-256 is .* remove the file to download it again"):
        fetch("x", tmp_path)
    assert (tmp_path / "x.bin").exists()


def test_size_and_digest_of_a_redirecting_server(server, tmp_path):
    """As Hugging Face does: the answer that redirects to the storage carries them."""
    server.add("/linked", sha256=None, size=None)
    server.behaviour.linked = {"X-Linked-Size": str(SIZE), "X-Linked-ETag": f'"{DIGEST}"'}
    (tmp_path / "x.bin.part").write_bytes(CONTENT[:5])
    assert fetch("x", tmp_path).read_bytes() == CONTENT
    assert server.behaviour.requests[-1] == ("GET", "/file", "bytes=5-")
    assert fetch("x", tmp_path).read_bytes() == CONTENT

    server.behaviour.linked["X-Linked-ETag"] = f'"{"1" * 64}"'
    with pytest.raises(ValueError, match="is 1111"):
        fetch("x", tmp_path)
    server.behaviour.linked = {"X-Linked-Size": "12"}
    with pytest.raises(ValueError, match="has 12"):
        fetch("x", tmp_path)


def test_without_a_network_the_error_says_what_to_put_where(tmp_path, monkeypatch):
    url = "http://127.0.0.1:9/file"
    monkeypatch.setitem(FILES, "x", PublicFile(url, "x.bin", "none", None, None))
    with pytest.raises(OSError) as caught:
        fetch("x", tmp_path)
    assert url in str(caught.value) and f"put it at {tmp_path / 'x.bin'}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_put_there_by_hand_is_kept_with_a_warning_where_nobody_can_vouch(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FILES, "x", PublicFile("http://127.0.0.1:9/file", "x.bin", "none", None, None))
    (tmp_path / "x.bin").write_bytes(b"by hand")
    assert fetch("x", tmp_path).read_bytes() == b"by hand"
    assert "kept, but not verified" in capsys.readouterr().out


def test_a_refusal_is_named(server, tmp_path):
    url = server.add("/gone")
    with pytest.raises(OSError, match=f"{url}: the server answers HTTP Error 404"):
        fetch("x", tmp_path)
    assert server.behaviour.asked == [None]


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"'dinov3'.*dinov2-base, .*vgg16.*geolrm"):
        fetch("dinov3", ".")


def test_the_table_is_consistent():
    assert len({file.name for file in FILES.values()}) == len(FILES)
    for file in FILES.values():
        assert file.url.startswith("https://") and file.licence
        assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
    # torchvision names its files by the first digits of their SHA-256.
    vgg = FILES["vgg16"]
    assert vgg.sha256.startswith(vgg.name.removeprefix("vgg16-").removesuffix(".pth"))
