"Fetching BreakHis: servers that fail in every way, archives that mean harm, and runs that are killed."
import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from filelock import FileLock
from PIL import Image

from kdnb import archive
from kdnb.archive import download, fetch, main, part_state
from kdnb.core import BadInput

LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background hears none
NAMES = [f"SOB_B_A-14-22549AB-40-{i:03d}.png" for i in range(1, 4)] + ["SOB_M_DC-14-2523-400-010.png"]
KINK = 70_000  # bytes after which a server hangs up: more than one piece, so that a part stays


def png(i):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (i, 90, 160)).save(out, "PNG")
    return out.getvalue()


def make_tar(members, mode="w:gz", pad=0):
    "A tar of {name: bytes}, or of TarInfos; `pad` adds bytes that do not compress."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in {**members, **({"BreaKHis_v1/pad": os.urandom(pad)} if pad else {})}.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(content, tarfile.TarInfo): info.size = len(content)
            tar.addfile(info, None if isinstance(content, tarfile.TarInfo) else io.BytesIO(content))
    return out.getvalue()


def make_zip(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, content in members.items(): z.writestr(name, content)
    return out.getvalue()


TREE = {f"BreaKHis_v1/x/{n}": png(i) for i, n in enumerate(NAMES)}
GOOD = make_tar(TREE, pad=200_000)


class Handler(BaseHTTPRequestHandler):
    "Serves `body`, knows ranges and validators; `act(self, n, asked, start)` may misbehave instead and return True."
    body, tag, act, asked, slow = GOOD, '"v1"', None, [], 0

    def log_message(self, *_): pass

    def send(self, code, body=b"", **headers):
        self.send_response(code)
        for k, v in {"Content-Length": len(body), **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
            if v is not None: self.send_header(k, str(v))
        self.end_headers()
        for i in range(0, len(body), 20_000):
            self.wfile.write(body[i:i + 20_000])
            if self.slow: time.sleep(self.slow)

    def do_GET(self):
        asked, cls = self.headers.get("Range"), type(self)
        cls.asked.append((asked, self.headers.get("If-Range")))
        start = int(asked[6:-1]) if asked else 0
        if cls.act and cls.act(self, len(cls.asked), asked, start): return
        if asked and self.headers.get("If-Range") in (None, self.tag):
            if start >= len(self.body): return self.send(416, Content_Range=f"bytes */{len(self.body)}")
            span = f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"
            return self.send(206, self.body[start:], Content_Range=span, ETag=self.tag)
        self.send(200, self.body, ETag=self.tag)


@pytest.fixture
def serve(monkeypatch):
    "A server for this test; `serve(act=..., body=...)` gives its handler and the address of the archive."
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(archive, "PAUSE", 0)
    servers = []

    def start(**changes):
        kind = type("H", (Handler,), {"asked": [], **changes})
        server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        server.daemon_threads, server.handle_error = True, lambda *_: None
        threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
        servers.append(server)
        return kind, f"http://127.0.0.1:{server.server_port}/db/BreaKHis_v1.tar.gz"
    yield start
    for s in servers: s.shutdown(), s.server_close()


def hang_up(times):
    "Promise everything, send `KINK` bytes of it; as often as said."
    def act(h, n, asked, start):
        if n > times: return False
        total = len(h.body)
        span = f"bytes {start}-{total - 1}/{total}" if asked else None
        h.send(206 if asked else 200, h.body[start:start + KINK], Content_Length=total - start, Content_Range=span,
               ETag=h.tag)
        return True
    return act


def whole(folder): return sorted(p.name for p in (folder/"BreaKHis_v1").rglob("*.png")) == sorted(NAMES)


def left(folder): return sorted(p.name for p in folder.iterdir() if p.name != ".fetch.lock")


# ---- the transfer

def test_fetch_brings_the_tree_and_records_its_digest(serve, tmp_path, capsys):
    h, url = serve()
    main(["fetch", "--to", str(tmp_path/"new"/"data"), "--url", url])
    to = tmp_path/"new"/"data"
    assert whole(to) and left(to) == ["BreaKHis_v1", "BreaKHis_v1.tar.gz", "BreaKHis_v1.tar.gz.json"]
    record = json.loads((to/"BreaKHis_v1.tar.gz.json").read_text())
    assert (record["url"], record["bytes"], record["sha256"]) == (url, len(GOOD), hashlib.sha256(GOOD).hexdigest())
    assert record["date"].startswith("20") and "4 images" in capsys.readouterr().out


def test_fetch_goes_to_the_data_folder_by_default(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("KDNB_DATA", str(tmp_path/"mine"))
    assert fetch(url=serve()[1]) == tmp_path/"mine"/"BreaKHis_v1"


def test_a_broken_transfer_is_gone_on_with(serve, tmp_path):
    h, url = serve(act=hang_up(2))
    assert whole(fetch(tmp_path, url).parent)
    assert h.asked == [(None, None), (f"bytes={KINK}-", '"v1"'), (f"bytes={2 * KINK}-", '"v1"')]


def test_a_length_that_lies_long_ends_with_what_came_and_the_next_call_resumes(serve, tmp_path):
    def lie(h, n, asked, start):
        h.send(206 if asked else 200, b"" if asked else h.body[:KINK], Content_Length=len(h.body) - start, ETag=h.tag,
               Content_Range=f"bytes {start}-{len(h.body) - 1}/{len(h.body)}" if asked else None)
        return True
    h, url = serve(act=lie)
    with pytest.raises(BadInput, match=f"ended early; {KINK:,} of {len(GOOD):,} bytes came; they are kept"):
        fetch(tmp_path, url)
    assert left(tmp_path) == ["BreaKHis_v1.tar.gz.part", "BreaKHis_v1.tar.gz.part.json"]
    assert len(h.asked) == 1 + archive.TRIES
    h.act, n = None, len(h.asked)
    assert whole(fetch(tmp_path, url).parent) and h.asked[n:] == [(f"bytes={KINK}-", '"v1"')]


def test_a_length_that_lies_short_is_a_damaged_archive(serve, tmp_path):
    h, url = serve(act=lambda h, n, *_: h.send(200, h.body[:KINK], ETag=h.tag) or True)
    with pytest.raises(BadInput, match="damaged or cut short.*end-of-stream"): fetch(tmp_path, url)
    assert left(tmp_path) == ["BreaKHis_v1.tar.gz.rejected"]
    h.act = None
    assert whole(fetch(tmp_path, url).parent)


def test_pauses_grow_and_a_server_that_stays_down_is_left(serve, tmp_path, monkeypatch):
    h, url = serve(act=lambda h, *_: h.send_error(503) or True)
    pauses = []
    monkeypatch.setattr(archive, "PAUSE", 1)
    monkeypatch.setattr(archive.time, "sleep", pauses.append)
    with pytest.raises(BadInput, match="503 Service Unavailable; 0 of an unknown number of bytes came$"):
        fetch(tmp_path, url)
    assert pauses == [1, 2, 4, 8]


def test_a_server_without_ranges_starts_over(serve, tmp_path):
    def plain(h, n, asked, start):
        h.send(200, h.body[:KINK] if n == 1 else h.body, Content_Length=len(h.body), Last_Modified="yesterday")
        return True
    h, url = serve(act=plain)
    assert whole(fetch(tmp_path, url).parent) and h.asked[1] == (f"bytes={KINK}-", "yesterday")


def test_a_server_without_ranges_that_always_breaks_off_is_left(serve, tmp_path):
    h, url = serve(act=lambda h, *_: h.send(200, h.body[:KINK], Content_Length=len(h.body)) or True)
    with pytest.raises(BadInput, match=f"{KINK:,} of"): fetch(tmp_path, url)
    assert len(h.asked) == 1 + archive.TRIES


@pytest.mark.parametrize("honest,tag,more", [(True, '"v2"', 5), (False, None, 5), (False, '"v2"', 0)],
                         ids=["If-Range heard", "If-Range ignored", "If-Range ignored, same length"])
def test_a_file_that_changes_between_two_tries_is_never_mixed(serve, tmp_path, honest, tag, more):
    new = make_tar({**TREE, "BreaKHis_v1/pad": os.urandom(200_000 + more)}, "w")
    old = make_tar({**TREE, "BreaKHis_v1/pad": os.urandom(200_000)}, "w")
    new += bytes(more * 512)

    def change(h, n, asked, start):
        if n == 1: return hang_up(1)(h, n, asked, start)
        type(h).body, type(h).tag = new, '"v2"'
        if honest or not asked: return False
        return h.send(206, new[start:], Content_Range=f"bytes {start}-{len(new) - 1}/{len(new)}", ETag=tag) or True
    h, url = serve(act=change, body=old)
    assert whole(fetch(tmp_path, url).parent)
    assert (tmp_path/"BreaKHis_v1.tar.gz").read_bytes() == new and h.asked[1] == (f"bytes={KINK}-", '"v1"')


def test_a_weak_validator_is_not_used(serve, tmp_path):
    h, url = serve(act=hang_up(1), tag='W/"v1"')
    fetch(tmp_path, url)
    assert h.asked[1] == (f"bytes={KINK}-", None)


def test_a_part_that_goes_on_elsewhere_is_dropped(serve, tmp_path):
    def shift(h, n, asked, start):
        if n == 1: return hang_up(1)(h, n, asked, start)
        total = len(h.body)
        span = f"bytes {start + 5}-{total - 1}/{total}"
        return asked and (h.send(206, h.body[start + 5:], Content_Range=span) or True)
    h, url = serve(act=shift)
    assert whole(fetch(tmp_path, url).parent) and [a for a, _ in h.asked] == [None, f"bytes={KINK}-", None]


@pytest.mark.parametrize("there", ["all of it", "more than all"])
def test_416_says_whether_all_is_here(serve, tmp_path, there):
    h, url = serve()
    part = tmp_path/"a.part"
    part.write_bytes(GOOD + b"x" * (there != "all of it"))
    (tmp_path/"a.part.json").write_text(json.dumps({"url": url, "total": None, "validator": '"v1"'}))
    assert download(url, tmp_path/"a").read_bytes() == GOOD
    assert [a for a, _ in h.asked][1:] == ([] if there == "all of it" else [None])


def test_a_part_of_unknown_origin_is_not_trusted(serve, tmp_path):
    h, url = serve()
    for note in ("", "[]", "{}", json.dumps({"url": "http://elsewhere/a", "total": 9, "validator": None})):
        (tmp_path/"a.part").write_bytes(b"rubbish")
        (tmp_path/"a.part.json").write_text(note)
        assert part_state(tmp_path/"a.part", url) == {"url": url, "have": 0}
        assert download(url, tmp_path/"a").read_bytes() == GOOD
    assert {a for a, _ in h.asked} == {None}


def test_a_gzip_is_not_taken_for_a_coat(serve, tmp_path):
    h, url = serve(act=lambda h, n, asked, start: not asked and (h.send(200, h.body, Content_Encoding="gzip") or True))
    fetch(tmp_path, url)
    assert (tmp_path/"BreaKHis_v1.tar.gz").read_bytes() == GOOD


def test_redirects_are_followed_and_loops_are_not(serve, tmp_path):
    h, url = serve()
    hop, old = serve(act=lambda s, *_: s.send(302, Location=url) or True)
    assert whole(fetch(tmp_path/"a", old).parent)
    lost, gone = serve(act=lambda s, *_: (s.send(302, Location="/new") if "db" in s.path else s.send_error(404), True))
    with pytest.raises(BadInput, match=rf"{gone} \(redirected to .*/new\): the server answers 404"):
        fetch(tmp_path/"c", gone)
    loop, round_ = serve(act=lambda s, *_: s.send(302, Location=s.path) or True)
    with pytest.raises(BadInput, match=f"{round_} redirects without end"): fetch(tmp_path/"b", round_)


@pytest.mark.parametrize("code", [403, 404, 410])
def test_a_refusal_names_address_and_status(serve, tmp_path, code):
    h, url = serve(act=lambda h, *_: h.send_error(code) or True)
    with pytest.raises(BadInput, match=f"{url}: the server answers {code} "): fetch(tmp_path, url)
    assert len(h.asked) == 1


def test_no_connection_names_address_and_reason(serve, tmp_path):
    with pytest.raises(BadInput, match=r"http://127.0.0.1:9/x.tar.gz: .*refused; 0 of"):
        fetch(tmp_path, "http://127.0.0.1:9/x.tar.gz")


@pytest.mark.parametrize("url", ["ftp://h/x.tar.gz", "http://", "http://[::1/x"])
def test_addresses_that_are_none(tmp_path, url):
    with pytest.raises(BadInput, match="(http|ftp)"): fetch(tmp_path, url)


def test_a_silent_server_is_not_waited_for_without_end(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "TIMEOUT", (1, .1))
    h, url = serve(act=lambda h, *_: time.sleep(.3) or True)
    with pytest.raises(BadInput, match="timed out"): fetch(tmp_path, url)


def test_a_full_disk_is_named(serve, tmp_path, monkeypatch):
    h, url = serve()
    real = archive.shutil.disk_usage
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda p: real(p)._replace(free=1000))
    with pytest.raises(BadInput, match=f"{len(GOOD):,} bytes are to come and 1,000 are free"): fetch(tmp_path, url)
    (tmp_path/"local.tar.gz").write_bytes(GOOD)
    with pytest.raises(BadInput, match="bytes are to be unpacked and 1,000 are free"):
        fetch(tmp_path/"b", str(tmp_path/"local.tar.gz"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full, a disk that is always full")
def test_a_disk_that_fills_up_is_named(serve, tmp_path):
    (tmp_path/"a.part").symlink_to("/dev/full")
    with pytest.raises(BadInput, match="a.part: No space left"): download(serve()[1], tmp_path/"a")


# ---- the right file

def test_a_web_page_is_set_aside_and_the_next_call_begins_anew(serve, tmp_path):
    h, url = serve(body=b"<!DOCTYPE html><html>We moved</html>")
    with pytest.raises(BadInput, match="it is a web page. What came is kept as .*rejected"): fetch(tmp_path, url)
    assert (tmp_path/"BreaKHis_v1.tar.gz.rejected").read_bytes() == h.body
    h.body = GOOD
    assert whole(fetch(tmp_path, url).parent)


@pytest.mark.parametrize("body,says", [
    (b"", "it is empty"), (b"Rar!" + b"x" * 90, "a RAR archive"), (png(0), "a PNG picture"), (b"MZ...", "no archive"),
    (make_tar({"data/cat.png": png(0)}), "no BreakHis image among its 1 members, such as 'data/cat.png'"),
    (make_tar({}), "no BreakHis image among its 0 members"), (make_zip({"x.txt": b"x"}), "no BreakHis image"),
    (make_zip(TREE)[:-30], "damaged"), (GOOD[:-8] + bytes(8), "damaged: CRC check failed"),
    (make_tar(TREE, "w:xz")[:-40], "damaged"), (b"\x1f\x8b" + b"no gzip at all" * 9, "damaged"),
    (make_tar(TREE, "w")[:1240], "damaged"), (make_tar(TREE, "w")[:512], "damaged")], ids=range(13))
def test_wrong_files_are_called_what_they_are(tmp_path, body, says):
    (tmp_path/"a.tar.gz").write_bytes(body)
    with pytest.raises(BadInput, match=says): fetch(tmp_path/"to", str(tmp_path/"a.tar.gz"))
    assert (tmp_path/"a.tar.gz").read_bytes() == body, "a file of the user's is never moved"
    assert left(tmp_path/"to") == []


def test_later_downloads_must_match_the_first(serve, tmp_path):
    h, url = serve()
    tree, new = fetch(tmp_path, url), make_tar(TREE, pad=10)
    tree.rename(tmp_path/"old")
    note = (tmp_path/"BreaKHis_v1.tar.gz.json").stat().st_mtime_ns
    assert whole(fetch(tmp_path, url).parent) and len(h.asked) == 1, "unpacked again without a download"
    assert (tmp_path/"BreaKHis_v1.tar.gz.json").stat().st_mtime_ns == note, "the first download stays the reference"
    (tmp_path/"BreaKHis_v1").rename(tmp_path/"old2")
    (tmp_path/"BreaKHis_v1.tar.gz").unlink()
    h.body, h.tag = new, '"v2"'
    with pytest.raises(BadInput, match=rf"its size is {len(new)}, expected {len(GOOD)} .*move that note away"):
        fetch(tmp_path, url)
    assert (tmp_path/"BreaKHis_v1.tar.gz.rejected").read_bytes() == new and not (tmp_path/"BreaKHis_v1").exists()
    pin = hashlib.sha256(new).hexdigest()
    assert whole(fetch(tmp_path, url, sha256=pin).parent), "a pin is believed above the note"


def test_pins(serve, tmp_path):
    h, url = serve()
    good, bad = hashlib.sha256(GOOD).hexdigest(), "0" * 64
    with pytest.raises(BadInput, match=f"its sha256 is {good}, expected {bad} "): fetch(tmp_path/"a", url, sha256=bad)
    assert left(tmp_path/"a") == ["BreaKHis_v1.tar.gz.rejected"]
    with pytest.raises(BadInput, match=rf"announces {len(GOOD):,} bytes, --size says 12$"):
        fetch(tmp_path/"b", url, size=12)
    assert whole(fetch(tmp_path/"c", url, good.upper(), len(GOOD)).parent)
    for pins in ({"sha256": "beef"}, {"size": 0}):
        with pytest.raises(BadInput, match="is not accepted"): fetch(tmp_path/"d", url, **pins)


def test_a_broken_note_is_named(tmp_path):
    (tmp_path/"a.tar.gz").write_bytes(GOOD)
    (tmp_path/"a.tar.gz.json").write_text('{"bytes": 1}')
    with pytest.raises(BadInput, match="a.tar.gz.json is no record"): fetch(tmp_path, str(tmp_path/"a.tar.gz"))


# ---- unpacking

def entry(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("name,content,why", [
    ("../thief.png", b"x", "leads outside"), ("BreaKHis_v1/../../thief.png", b"x", "leads outside"),
    ("/tmp/thief.png", b"x", "absolute path"), ("C:\\thief.png", b"x", "absolute path"),
    ("a\\..\\..\\thief.png", b"x", "leads outside"), ("link", entry("link", tarfile.SYMTYPE, "../out"), "is a link"),
    ("link", entry("link", tarfile.SYMTYPE, "/etc"), "is a link"),
    ("hard", entry("hard", tarfile.LNKTYPE, "../../out"), "is a link"),
    ("null", entry("null", tarfile.CHRTYPE), "or a device"), ("pipe", entry("pipe", tarfile.FIFOTYPE), "or a device")],
    ids=range(10))
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_nothing_leaves_the_target(tmp_path, kind, name, content, why):
    path, to = tmp_path/f"evil.{kind}", tmp_path/"deep"/"to"
    if kind == "tar": path.write_bytes(make_tar({**TREE, name: content}, "w"))
    elif isinstance(content, bytes): path.write_bytes(make_zip({**TREE, name: content}))
    else:
        info = zipfile.ZipInfo(name)
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        path.write_bytes(make_zip({**TREE, info: "../out"}))
        why = "is a link"
    with pytest.raises(BadInput) as e: fetch(to, str(path))
    assert repr(name) in str(e.value) and why in str(e.value)
    assert left(to) == [] and sorted(p.name for p in tmp_path.rglob("*.png")) == []


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_kinds_of_archives(tmp_path, mode):
    (tmp_path/"from a browser").write_bytes(make_zip(TREE) if mode == "zip" else make_tar(TREE, mode))
    tree = fetch(tmp_path/"to", (tmp_path/"from a browser").as_uri() if mode == "w" else str(tmp_path/"from a browser"))
    assert whole(tree.parent) and sorted(left(tree.parent)) == ["BreaKHis_v1", "from a browser.json"]
    assert stat.S_IMODE(tree.stat().st_mode) == 0o755


def test_an_archive_of_several_folders_lands_in_one(tmp_path):
    kaggle = {f"BreaKHis_v1/{n}": c for n, c in TREE.items()} | {"Folds.csv": b"mag,grp,fold,filename\n"}
    (tmp_path/"archive.zip").write_bytes(make_zip(kaggle))
    tree = fetch(tmp_path, str(tmp_path/"archive.zip"))
    assert whole(tmp_path) and (tree/"Folds.csv").exists() and (tree/"BreaKHis_v1"/"BreaKHis_v1").is_dir()


def test_an_encrypted_zip_is_refused(tmp_path):
    body = bytearray(make_zip(TREE))
    for i in range(len(body) - 4):  # the flag that says so, in both headers of every member
        if body[i:i + 4] == b"PK\x03\x04": body[i + 6] |= 1
        if body[i:i + 4] == b"PK\x01\x02": body[i + 8] |= 1
    (tmp_path/"a.zip").write_bytes(body)
    with pytest.raises(BadInput, match="encrypted"): fetch(tmp_path/"to", str(tmp_path/"a.zip"))
    assert left(tmp_path/"to") == []


def test_a_tree_that_is_there_is_not_touched(serve, tmp_path, capsys):
    h, url = serve()
    tree = tmp_path/"BreaKHis_v1"
    tree.mkdir()
    (tree/NAMES[0]).write_bytes(png(0))
    assert fetch(tmp_path, url) == tree and not h.asked and len(list(tree.iterdir())) == 1
    assert f"already there: {tree} (1 images)" in capsys.readouterr().out
    (tree/NAMES[0]).unlink()
    with pytest.raises(BadInput, match="no BreakHis images under .*BreaKHis_v1"): fetch(tmp_path, url)


@pytest.mark.parametrize("kind", ["address", "file"])
def test_pins_are_compared_with_what_was_noted_of_a_tree_that_is_there(serve, tmp_path, capsys, kind):
    h, url = serve()
    (tmp_path/"from a browser.zip").write_bytes(GOOD)
    if kind == "file": url = str(tmp_path/"from a browser.zip")
    good, bad, to = hashlib.sha256(GOOD).hexdigest(), "0" * 64, tmp_path/"to"
    fetch(to, url)
    (to/"other.json").write_text("[]")
    (to/"elsewhere.zip.json").write_text(json.dumps({"bytes": 7, "sha256": bad}))
    with pytest.raises(BadInput, match=f"the sha256 of its archive was {good} .*, not {bad} "): fetch(to, url, bad)
    with pytest.raises(BadInput, match=rf"the size of its archive was {len(GOOD)} \(noted in .*, not 7 \(--size"):
        fetch(to, url, good, 7)
    capsys.readouterr()
    fetch(to, url, good.upper(), len(GOOD))
    assert "--size and --sha256 agree with what was noted" in capsys.readouterr().out
    fetch(to, url)
    assert "not" not in capsys.readouterr().out.replace("noted", "")


def test_pins_of_a_tree_nothing_is_noted_of(serve, tmp_path, capsys):
    h, url = serve()
    (tmp_path/"BreaKHis_v1"/"histology_slides").mkdir(parents=True)
    (tmp_path/"BreaKHis_v1"/"histology_slides"/NAMES[0]).write_bytes(png(0))
    fetch(tmp_path, url, sha256="0" * 64)
    out = capsys.readouterr().out
    assert "already there" in out
    assert "nothing is noted of the archive it came from, so --sha256 cannot be checked" in out
    (tmp_path/"mirror.zip.json").write_text(json.dumps({"bytes": 7, "sha256": "1" * 64}))  # came from elsewhere
    for folder in (tmp_path, tmp_path/"BreaKHis_v1"):
        with pytest.raises(BadInput, match=f"was {'1' * 64} .*, not {'0' * 64}"): fetch(folder, url, sha256="0" * 64)
    with pytest.raises(BadInput, match="is not accepted"): fetch(tmp_path, url, size=0)


def test_a_name_that_contradicts_itself_among_good_ones(tmp_path, capsys):
    (tmp_path/"a.tar.gz").write_bytes(make_tar({**TREE, "BreaKHis_v1/x/SOB_M_A-14-22549AB-40-009.png": png(9)}))
    tree = fetch(tmp_path/"to", str(tmp_path/"a.tar.gz"))
    assert "(4 images)" in capsys.readouterr().out and len(list(tree.rglob("*.png"))) == 5


def test_a_phantom_that_is_there_is_called_one(tmp_path, capsys):
    (tmp_path/"BreaKHis_v1").mkdir()
    (tmp_path/"BreaKHis_v1"/NAMES[0]).write_bytes(png(0))
    (tmp_path/"BreaKHis_v1"/"phantom.json").write_text("{}")
    fetch(tmp_path, "http://127.0.0.1:9/x.tar.gz")
    assert "SYNTHETIC" in capsys.readouterr().out


def test_a_data_folder_that_is_the_tree(serve, tmp_path, capsys):
    h, url = serve()
    (tmp_path/"histology_slides").mkdir()
    (tmp_path/"histology_slides"/NAMES[0]).write_bytes(png(0))
    assert fetch(tmp_path, url) == tmp_path and not h.asked and "already there" in capsys.readouterr().out


def test_targets_and_files_that_cannot_be(tmp_path):
    (tmp_path/"file").write_text("x")
    for to, url, says in ((tmp_path/"file", "x", "is a file"), (tmp_path, str(tmp_path), "is a folder"),
                          (tmp_path, "nowhere.tar.gz", "is no file, and 'nowhere.tar.gz' no address")):
        with pytest.raises(BadInput, match=says): fetch(to, url)


def test_two_at_once(tmp_path):
    with FileLock(tmp_path/".fetch.lock"), pytest.raises(BadInput, match="another kdnb_data fetch is at work here"):
        fetch(tmp_path, "x")


# ---- killed

def child(code, *args):
    return subprocess.Popen([sys.executable, "-c", f"{LISTEN}from kdnb import archive\n{code}\narchive.main({list(args)!r})"],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def until(condition, process):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.stderr.read()
        time.sleep(.01)


def test_killed_while_downloading(serve, tmp_path):
    h, url = serve(slow=.1)
    part = tmp_path/"BreaKHis_v1.tar.gz.part"
    p = child("", "fetch", "--to", str(tmp_path), "--url", url)
    until(lambda: part.exists() and part.stat().st_size > 60_000, p)
    p.kill(), p.wait()
    had, h.slow = part.stat().st_size, 0
    assert had < len(GOOD) and whole(fetch(tmp_path, url).parent)
    assert [a for a, _ in h.asked] == [None, f"bytes={had}-"]


def test_killed_while_unpacking(serve, tmp_path):
    h, url = serve()
    slow = "import tarfile, time\nreal = tarfile.TarFile.makefile\n" \
           "tarfile.TarFile.makefile = lambda *a: (real(*a), time.sleep(.2))"
    p = child(slow, "fetch", "--to", str(tmp_path), "--url", url)
    until(lambda: list(tmp_path.glob(".unpacking-*/*/x/*")), p)
    p.kill(), p.wait()
    assert not (tmp_path/"BreaKHis_v1").exists() and not (tmp_path/"BreaKHis_v1.tar.gz.json").exists()
    assert whole(fetch(tmp_path, url).parent) and len(h.asked) == 1, "not downloaded again"
    assert left(tmp_path) == ["BreaKHis_v1", "BreaKHis_v1.tar.gz", "BreaKHis_v1.tar.gz.json"]


def test_interrupted_by_the_user(serve, tmp_path):
    h, url = serve(slow=.1)
    part = tmp_path/"BreaKHis_v1.tar.gz.part"
    p = child("", "fetch", "--to", str(tmp_path), "--url", url)
    until(lambda: part.exists() and part.stat().st_size, p)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=10)[1]
    assert p.returncode == 1 and "Traceback" not in err
    assert err.strip().splitlines()[-1].strip().endswith("and the next call goes on from it") and part.stat().st_size


# ---- the command

@pytest.mark.parametrize("argv", [[], ["fetsh"], ["index"], ["fetch", "--size", "many"]])
def test_usage(argv, capsys):
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code == 2 and "usage: kdnb_data" in capsys.readouterr().err


def test_errors_are_one_line(tmp_path):
    with pytest.raises(SystemExit) as e: main(["fetch", "--to", str(tmp_path), "--url", "gone.zip"])
    assert str(e.value.code).startswith("kdnb_data: ") and "\n" not in str(e.value.code)

