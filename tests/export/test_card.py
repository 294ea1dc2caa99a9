"""The card of an exported folder, and its way to a hub."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from apecache_cli.app import app
from typer.testing import CliRunner

from apecache.errors import DataError
from apecache.export.export_run import ExportRunSpec, export_run


def front_matter(folder: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    return metadata


def test_the_card_has_the_runs_data_the_figures_and_the_license(
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    report = {
        "task": "retrieval",
        "split": "val",
        "image_to_text": {"1": 41.5},
        "text_to_image": {"1": 33.25},
        "intervals": {"image_to_text": {"1": [38.0, 45.0]}, "text_to_image": {"1": [30, 36.5]}},
    }
    (tmp_path / "val.json").write_text(json.dumps(report))
    spec = ExportRunSpec(
        to="safetensors",
        license_name="apache-2.0",
        evaluations=(tmp_path / "val.json",),
    )
    export_run(tiny_run, tmp_path / "out", spec=spec)
    card = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(tmp_path / "out")["license"] == "apache-2.0"
    assert front_matter(tmp_path / "out")["library_name"] == "apecache"
    assert "| retrieval, val | image to text R\\@1, % | 41.50 | 38.00 to 45.00 |" in card
    assert "| retrieval, val | text to image R\\@1, % | 33.25 | 30.00 to 36.50 |" in card
    # From the card of the run: where the pairs came from, and what the fit cost.
    run_card = (tiny_run / "README.md").read_text()
    data_row = next(line for line in run_card.splitlines() if "training" in line)
    assert data_row in card
    assert card.count("## Use") == 1
    assert "apecache.load" not in card


def test_a_license_that_nobody_stated_is_not_made_up(tiny_run: Path, tmp_path: Path) -> None:
    export_run(tiny_run, tmp_path / "out", spec=ExportRunSpec(to="safetensors"))
    assert "license" not in front_matter(tmp_path / "out")
    assert "| heads | not stated |" in (tmp_path / "out" / "README.md").read_text()


def test_a_file_that_is_not_a_report_is_named(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    spec = ExportRunSpec(to="safetensors", evaluations=(tmp_path / "x.json",))
    with pytest.raises(DataError, match=r"x\.json is not a report"):
        export_run(tiny_run, tmp_path / "out", spec=spec)
    assert not (tmp_path / "out").exists()


class FakeHub(BaseHTTPRequestHandler):
    """Take a repository and one commit, as the hub's HTTP interface does, without LFS."""

    created: list[dict[str, Any]]
    files: dict[str, bytes]
    refuses = False

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        path = self.path.partition("?")[0]
        if self.refuses:
            self._answer(403, {"error": "Forbidden"})
        elif path == "/api/repos/create":
            self.created.append(json.loads(raw))
            self._answer(200, {"url": f"http://{self.headers['Host']}/ORG/NAME"})
        elif "/preupload/" in path:
            entries = json.loads(raw)["files"]
            listed = [
                {"path": entry["path"], "uploadMode": "regular", "shouldIgnore": False}
                for entry in entries
            ]
            self._answer(200, {"files": listed})
        elif "/commit/" in path:
            import base64

            for line in raw.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            answer = {
                "commitUrl": f"http://{self.headers['Host']}/ORG/NAME/commit/0",
                "commitOid": "0" * 40,
                "success": True,
            }
            self._answer(200, answer)
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        else:
            self._answer(404, {"error": path})

    def do_GET(self) -> None:
        self._answer(404, {"error": "nothing yet"})

    def _answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the log of the tests free of requests."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    import huggingface_hub.constants

    class Handler(FakeHub):
        pass

    Handler.created = []
    Handler.files = {}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield Handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_folder_is_uploaded_whole(hub: type[FakeHub], tiny_run: Path, tmp_path: Path) -> None:
    command = ["export-run", str(tiny_run), str(tmp_path / "out"), "--to", "safetensors"]
    result = CliRunner().invoke(app, [*command, "--push-to-hub", "ORG/NAME", "--private"])
    assert result.exit_code == 0, result.output
    (created,) = hub.created
    # The client names it in one way or the other, by its version.
    assert created.get("private") or created.get("visibility") == "private"
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    uploaded = {name: data for name, data in hub.files.items() if name != ".gitattributes"}
    assert set(uploaded) == set(written)
    for name, data in uploaded.items():
        digest = hashlib.sha256(written[name].read_bytes()).hexdigest()
        assert hashlib.sha256(data).hexdigest() == digest


def test_a_hub_that_refuses_leaves_the_folder(
    hub: type[FakeHub],
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    hub.refuses = True
    command = ["export-run", str(tiny_run), str(tmp_path / "out"), "--to", "safetensors"]
    result = CliRunner().invoke(app, [*command, "--push-to-hub", "ORG/NAME"])
    assert result.exit_code == 3
    assert "hf upload ORG/NAME" in result.output
    assert (tmp_path / "out" / "heads.json").is_file()
    new = [*command[:2], str(tmp_path / "new"), *command[3:]]
    bad = CliRunner().invoke(app, [*new, "--push-to-hub", "x"])
    assert bad.exit_code == 2
    assert not (tmp_path / "new").exists()
