"""`--push-to-hub` against a hub on this machine: huggingface_hub's own client, over HTTP."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.hf.tiny import make_tiny


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; what arrives is kept in the server's `received`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, value, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:
        self.server.received[self.path.rsplit("/", 1)[1]] = self._body()
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"id": "me/tuned", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body, hub = self._body(), self.server
        if self.headers.get("authorization") != "Bearer hf_right":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._answer({"url": f"{hub.url}/me/tuned"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            self._answer(
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": mode[f["path"].endswith("safetensors")],
                            "shouldIgnore": False,
                        }
                        for f in files
                    ]
                }
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.received[value["oid"]]
            commit = "1" * 40
            self._answer({"commitUrl": f"{hub.url}/me/tuned/commit/{commit}", "commitOid": commit})
        else:
            self._answer({})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.created, server.received, server.files = [], {}, {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


_PROGRAM = """
import sys
from pathlib import Path
from megatron_dft.commands.export_hf import push
push(Path(sys.argv[1]), "me/tuned")
"""


def _push(directory, hub, token):
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, directory],
        env=os.environ | settings,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


@pytest.fixture
def exported(tmp_path):
    directory = make_tiny("llama", tmp_path / "out", vocab_size=260, max_shard_size="60KB")
    (directory / "README.md").write_text("# tuned\n")
    return directory


def test_the_whole_export_arrives(exported, hub):
    done = _push(exported, hub, "hf_right")
    assert done.returncode == 0, done.stderr
    sent = {f.name: f.read_bytes() for f in exported.iterdir()}
    assert hub.files == sent and len([n for n in sent if n.endswith(".safetensors")]) > 1
    large = (v for n, v in sent.items() if n.endswith(".safetensors"))
    assert hub.received == {hashlib.sha256(v).hexdigest(): v for v in large}
    (made,) = hub.created  # huggingface_hub says it in one of two ways
    assert made["name"] == "tuned" and (made.get("private") or made.get("visibility") == "private")
    assert f"uploaded: {hub.url}/me/tuned/commit/" in done.stdout


def test_a_refused_upload_says_that_the_export_is_whole(exported, hub):
    done = _push(exported, hub, "hf_wrong")
    assert done.returncode and not hub.files
    line = done.stderr.strip().splitlines()[-1]
    assert "--push-to-hub me/tuned: " in line and "401" in line
    assert f"The export itself is whole: {exported}" in line
