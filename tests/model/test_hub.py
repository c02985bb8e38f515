"""Fetching from a hub: its own library against a server of the same interface, with a cut line and damaged files."""

import hashlib
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT, NAME = "c" * 40, "some-body/small-hyena"
WEIGHTS = bytes(range(256)) * 130_000  # several of the chunks that a download comes in


class Hub:
    """The parts of the hub's interface that a download needs. `cut_at` ends the first answer with weights early."""

    def __init__(self):
        self.files = {
            "config.json": b"{}",
            "model.safetensors": WEIGHTS,
            "pytorch_model.bin": b"pickle",
            "code.py": b"1",
        }
        self.served, self.ranges, self.cut_at, self.sizes = [], [], None, {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def log_message(self, *args):
                pass

            def answer(self, *, body):
                path = self.path.partition("?")[0]
                if path.startswith(f"/api/models/{NAME}/tree/"):
                    return self.send(json.dumps([hub.entry(name) for name in hub.files]).encode(), body)
                if path.startswith(f"/api/models/{NAME}"):
                    return self.send(json.dumps(hub.about()).encode(), body)
                name = path.rpartition("/")[2]
                if not path.startswith(f"/{NAME}/resolve/") or name not in hub.files:
                    return self.send(b'{"error": "Repository not found"}', body, 404)
                return self.send_file(name, body)

            def send(self, data, body, status=200):
                self.send_response(status)
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def send_file(self, name, body):
                data, wanted = hub.files[name], self.headers.get("Range")
                start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("ETag", f'"{hub.hash_of(name)}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                if not body:
                    return
                hub.served.append(name)
                hub.ranges.append(start)
                if name == "model.safetensors" and hub.cut_at:
                    data, hub.cut_at = data[: hub.cut_at], None
                    self.close_connection = True
                self.wfile.write(data[start:])

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()

    def hash_of(self, name):
        """As the hub tells it: of the files as they were."""
        data = WEIGHTS if name == "model.safetensors" else self.files[name]
        return hashlib.sha256(data).hexdigest() if name.endswith("safetensors") else git_hash(data)

    def entry(self, name):
        size = self.sizes.get(name, len(self.files[name]))
        entry = {"type": "file", "path": name, "size": size, "oid": git_hash(self.files[name])}
        return entry | (
            {"lfs": {"oid": self.hash_of(name), "size": size, "pointerSize": 130}} if "safe" in name else {}
        )

    def about(self):
        entries = [self.entry(name) for name in self.files]
        siblings = [
            {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]}
            | ({"lfs": {"sha256": e["lfs"]["oid"], "size": e["size"], "pointerSize": 130}} if "lfs" in e else {})
            for e in entries
        ]
        return {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings, "cardData": {"license": "apache-2.0"}}


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.server.shutdown()


@pytest.fixture
def fetch(hub, tmp_path, monkeypatch):
    """`stripedrag fetch` in a process of its own: the hub's library reads its environment once."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server.server_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def run(name=NAME, *more):
        command = [sys.executable, "-m", "stripedrag.eval.cli", "fetch", name, *more]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def test_what_is_read_of_a_model_is_fetched_once_and_nothing_that_runs(hub, fetch):
    done = fetch(NAME, "--json")
    assert done.returncode == 0, done.stderr
    folder = json.loads(done.stdout)[NAME]
    assert {path.name for path in Path(folder).iterdir()} == {"config.json", "model.safetensors"}
    assert "0.0 GB, licence apache-2.0" in done.stderr
    look = "from stripedrag.model.loading import model_folder; print(model_folder('some-body/small-hyena'))"
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == folder
    assert set(hub.served) == {"config.json", "model.safetensors"}
    hub.served.clear()
    assert fetch().returncode == 0 and hub.served == []


def test_a_line_that_is_cut_goes_on_where_it_ended(hub, fetch):
    hub.cut_at = len(WEIGHTS) * 3 // 4
    done = fetch()
    assert done.returncode == 0, done.stderr
    assert max(hub.ranges) > 0, "from the beginning"


def test_a_file_with_another_hash_is_removed_and_fetched_anew(hub, fetch):
    hub.files["model.safetensors"] = WEIGHTS[:-1] + b"!"
    done = fetch()
    assert done.returncode == 2
    assert "model.safetensors has the hash" in done.stderr and "it is removed. Run `stripedrag fetch" in done.stderr
    hub.files["model.safetensors"] = WEIGHTS
    assert fetch().returncode == 0


def test_what_the_hub_does_not_give_is_told(hub, fetch, monkeypatch):
    for name, message in (
        ("some-body/else", "the hub has no some-body/else"),
        ("no/hub/id", "no model 'no/hub/id': it is not one of stripedhyena-hessian-7b"),
        ("smollm2-135m-instruct", "`stripedrag setup` prepares it"),
    ):
        done = fetch(name)
        assert (done.returncode, done.stdout) == (2, "") and message in done.stderr, done.stderr
    hub.sizes["model.safetensors"] = 10**18
    assert "takes 1000000000.0 GB" in fetch().stderr
    del hub.files["model.safetensors"]
    assert "has no safetensors, and pickled weights are not read" in fetch().stderr
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = fetch()
    assert done.returncode == 2 and "the hub did not give" in done.stderr
