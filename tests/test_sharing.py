"""Sets and scores that are elsewhere: a web server and an imitation of the hub, here, and what can go wrong."""
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from rdd_lib import addresses
from rdd_lib.addresses import fetched
from rdd_lib.cli_score import Asked, row_written
from rdd_lib.compressed import save
from rdd_lib.core import BrokenFile, MissingData
from rdd_lib.coresets.random import Random
from rdd_lib.data import load
from rdd_lib.files import kept
from rdd_lib.published import load_compressed
from rdd_lib.sharing.rows import read_row

COMMIT = "0123456789" * 4


class Elsewhere(BaseHTTPRequestHandler):
    """`/datasets/<user>/<name>/resolve/<revision>/<file>` as the hub has it; and what a bad server does: `/cut/<file>`
    ends too early, `/loop` leads to itself, `/stall` says nothing, `/flip/<file>` changes a byte."""
    protocol_version = "HTTP/1.1"
    root, asked = None, []

    def log_message(self, *args): pass

    def send(self, data, cut=0, **headers):
        self.send_response(200)
        for name, value in {"Content-Length": len(data), **headers}.items(): self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET": self.wfile.write(data[:len(data) - cut])
        if cut: self.close_connection = True

    def missing(self):
        "The hub says in a header what is missing."
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound" if "/me/digits/" in self.path else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        self.asked.append((self.command, self.path))
        if self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.path == "/stall": return time.sleep(3)
        path = re.sub(r"^/(cut|flip)/|^/datasets/me/digits/resolve/(main|v1)/|^/", "", self.path)
        file = self.root / path
        if not file.is_file(): return self.missing()
        data = file.read_bytes()
        if self.path.startswith("/flip/"): data = data[:-1] + bytes([data[-1] ^ 1])
        cut = 100 if self.path.startswith("/cut/") else 0
        self.send(data, cut, ETag=f'"{hashlib.sha256(data).hexdigest()}"', **{"X-Repo-Commit": COMMIT})

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A published folder: twenty digits, and the score of a student."
    from rdd_lib.sharing.publish import publish
    home = tmp_path_factory.mktemp("shared")
    few = Random().compress(load("mnist5k"), ipc=2)
    save(few, home / "few.safetensors")
    quick = Asked("quick", n_test=40, net="mlp", settings={"steps": "20", "attack.steps": "3"}, device="cpu",
                  out=home / "images.csv")
    row_written(home / "few.safetensors", few, quick, lambda line: None, home / "few.json")
    return publish(home / "few.safetensors", home / "out", [home / "few.json"])


@pytest.fixture
def web(folder, monkeypatch, tmp_path):
    "The address of a server that has the folder, and is the hub."
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Elsewhere,), {"root": folder, "asked": []}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)      # which it read when it was imported
    pattern = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", pattern)
    monkeypatch.setattr(addresses, "TIMEOUT", 1.)
    yield address
    server.shutdown()
    server.server_close()


def row_in(folder): return next((folder / "results").glob("*.json"))
def sha(path): return hashlib.sha256(path.read_bytes()).hexdigest()


def test_one_set_at_four_addresses(folder, web):
    here = load_compressed(folder / "set.safetensors")
    for address in (f"file://{folder}/set.safetensors", f"{web}/set.safetensors", "hf://me/digits/set.safetensors",
                    "hf://datasets/me/digits@v1/set.safetensors"):
        there = load_compressed(address)
        assert there.fingerprint == here.fingerprint and there.provenance == here.provenance, address


def test_show_score_and_rescore_take_addresses(folder, web, rdd, tmp_path):
    mark = sha(folder / "set.safetensors")
    done = rdd("show", f"{web}/set.safetensors#sha256={mark}")
    assert done.returncode == 0 and "20 images of 1x28x28" in done.stdout, done.stderr
    words = "--net", "mlp", "--attack", "quick", "--n-test", 20, "--set", "steps=3", "--row", "mine.json", "--by", "me"
    done = rdd("score", "hf://me/digits/set.safetensors", *words)
    assert done.returncode == 0, done.stderr
    mine = read_row(tmp_path / "mine.json")
    assert mine["set"]["file"] == "hf://me/digits/set.safetensors" and mine["by"] == "me"
    name = row_in(folder).name
    for address in (f"hf://me/digits/results/{name}", f"{web}/results/{name}", row_in(folder), tmp_path / "mine.json"):
        done = rdd("rescore", address, "--device", "cpu")
        assert done.returncode == 0 and "identical" in done.stdout and "same device" in done.stdout, done.stdout


def test_a_row_that_differs_says_in_what(folder, rdd, tmp_path):
    row = read_row(row_in(folder))
    row["set"]["file"] = str(folder / "set.safetensors")
    row["rob"]["per_seed"], row["device"], row["versions"]["torch"] = [.999], "an old machine", "1.0"
    (tmp_path / "row.json").write_text(json.dumps(row))
    done = rdd("rescore", "row.json", "--device", "cpu")
    assert done.returncode == 1
    for told in ("differs in the result: rob.per_seed", "device is 'an old machine'", "versions.torch is '1.0' there"):
        assert told in done.stdout


def test_a_published_folder_has_what_the_hub_reads(folder):
    card = (folder / "README.md").read_text()
    head = card.split("---\n")[1]
    assert 'license: "other"' in head and "dataset-distillation" in head and "n<1K" in head
    assert "set.png" in card and "robust" in card
    row = read_row(row_in(folder))
    assert sha(folder / "results" / row["per_image"]["file"]) == row["per_image"]["sha256"]


@pytest.mark.parametrize("place, told", [
    ("/cut/set.safetensors", "could not be fetched"), ("/loop", "TooManyRedirects"), ("/stall", "could not be fetched"),
    ("/none.safetensors", "404")])
def test_what_does_not_arrive_is_one_sentence(web, rdd, place, told):
    with pytest.raises(MissingData, match=told): fetched(web + place)
    assert not [p for p in kept("downloads").rglob("*") if p.is_file()]
    done = rdd("show", web + place)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1


def test_a_flipped_byte_is_refused_and_not_kept(folder, web):
    mark = sha(folder / "set.safetensors")
    with pytest.raises(BrokenFile, match="is not the file that is meant"): fetched(f"{web}/flip/set.safetensors", mark)
    assert not [p for p in kept("downloads").rglob("*") if p.is_file()]
    assert fetched(f"{web}/set.safetensors", mark).read_bytes() == (folder / "set.safetensors").read_bytes()


def test_a_file_whose_hash_is_known_is_fetched_once(folder, web, monkeypatch):
    mark = sha(folder / "set.safetensors")
    first = fetched(f"{web}/set.safetensors", mark)
    monkeypatch.setattr(addresses, "_from_web", lambda url, path: pytest.fail("fetched again"))
    assert fetched(f"{web}/set.safetensors", mark) == first


@pytest.mark.parametrize("address, told", [
    ("hf://me/digits/none.safetensors", "could not be fetched"), ("hf://me/other/x", "could not be fetched"),
    ("hf://digits", "reads hf://user/name"), ("s3://me/x", "an address begins with file://"),
    ("https://x.org/a#sha256=12", "64 hexadecimal digits")])
def test_addresses_that_lead_nowhere(web, rdd, address, told):
    done = rdd("show", address)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("change, told", [
    (lambda row: row.pop("threat"), "'threat' is a required property"),
    (lambda row: row.update(seeds=[]), "['seeds']"),
    (lambda row: row["set"].update(sha256="12"), "['set']['sha256']"),
    (lambda row: row.update(run="rm -rf"), "'run' was unexpected"),
    (lambda row: row["asked"].update(exec="x"), "exec, which this version does not know")])
def test_a_row_that_is_none_is_refused(folder, rdd, tmp_path, change, told):
    row = read_row(row_in(folder))
    row["set"]["file"] = str(folder / "set.safetensors")
    change(row)
    (tmp_path / "row.json").write_text(json.dumps(row))
    done = rdd("rescore", "row.json")
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_row_from_elsewhere_cannot_name_a_file_here(folder, web, rdd):
    row = read_row(row_in(folder))
    row["set"]["file"] = f"file://{folder}/set.safetensors"
    (folder / "odd.json").write_text(json.dumps(row))
    done = rdd("rescore", f"{web}/odd.json")
    (folder / "odd.json").unlink()
    assert done.returncode == 2 and "is elsewhere and names a file here" in done.stderr


def test_nothing_that_could_run_is_published(folder, rdd, tmp_path):
    Path(tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    done = rdd("publish", folder / "set.safetensors", "-o", "new", "--licence", "mit",
               "--model", "model.pt")
    assert done.returncode == 2 and "must be a .safetensors file" in done.stderr and not (tmp_path / "new").exists()
