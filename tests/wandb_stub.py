"""A W&B server in the test process, just large enough that the real client runs online against it.

It listens on 127.0.0.1 and speaks the parts of W&B's protocol that a run without artifacts uses:
GraphQL (who am I, is there such a run, make one, where do its files go), the file stream (rows,
summary, end of the run) and file uploads.
"""

import base64
import gzip
import json
import os
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

import pytest

from ddp_sgd.host import FACTOR

ENTITY = "tester"
KEY = "0123456789abcdef0123456789abcdef01234567"
"""A key of the form that wandb accepts: 40 characters."""


class WandbStub:
    """The server; a context manager that serves from a thread of its own.

    Args:
        key: The only key that it lets in; any other gets 401.
        hold: Accept every request and answer none until the server is closed.

    Attributes:
        url: What WANDB_BASE_URL is to be.
        asked: Set when the first request has come in.
        ended: Set when a run has said that it is over.
        exit_code: What the last run that is over said its exit code is.
        preempting: Ids of the runs that said that they will be stopped and go on later.
        paths: Paths of the requests that came in, in order.
        operations: Names of the GraphQL operations that came in, in order.
        runs: Variables of the last UpsertBucket of every run, by run id.
        rows: Rows of history of every run, by run id.
        events: Number of rows of system metrics of every run, by run id.
        summaries: Last summary of every run, by run id.
        uploads: Bodies of the files that were put, by path.
    """

    def __init__(self, *, key: str = KEY, hold: bool = False) -> None:
        self.key = key
        self.hold = hold
        self.asked = threading.Event()
        self.ended = threading.Event()
        self.exit_code: int | None = None
        self.preempting: set[str] = set()
        self.paths: list[str] = []
        self.operations: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.events: dict[str, int] = {}
        self.summaries: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.stub = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "WandbStub":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """Give the data of a GraphQL operation; None for one that the stub does not know."""
        known: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "Viewer": lambda _: {"viewer": _viewer()},
            "ServerFeaturesQuery": lambda _: {"serverInfo": {"features": []}},
            "OrgFeatureFlags": lambda _: {"organization": {"featureFlags": []}},
            "OrganizationCoreWeaveOrganizationID": lambda _: {"entity": {"organization": None}},
            "RunResumeStatus": self._resume_status,
            "UpsertBucket": self._upsert,
            "CreateRunFiles": self._create_files,
            "MarkRunFilesUploaded": lambda _: {"markRunFilesUploaded": {"success": True}},
            "RunState": lambda v: {"project": {"run": {"id": v["run"], "state": "running"}}},
        }
        return known[operation](variables) if operation in known else None

    def stream(self, run_id: str, body: dict[str, Any]) -> None:
        """Take a piece of a run's file stream."""
        files = body.get("files") or {}
        with self.lock:
            rows = self.rows.setdefault(run_id, [])
            if history := files.get("wandb-history.jsonl"):
                # Pieces that were sent again replace what came before at the same offset.
                rows[history["offset"] :] = [json.loads(line) for line in history["content"]]
            if events := files.get("wandb-events.jsonl"):
                self.events[run_id] = events["offset"] + len(events["content"])
            for line in files.get("wandb-summary.json", {}).get("content", []):
                self.summaries[run_id] = json.loads(line)
            if body.get("preempting"):
                self.preempting.add(run_id)
        if body.get("complete"):
            self.exit_code = body.get("exitcode")
            self.ended.set()

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        model = {"id": "project", "name": variables["project"], "entity": _named(ENTITY)}
        run_id = variables["name"]
        with self.lock:
            known = self.runs.get(run_id)
            rows = self.rows.get(run_id, [])
            summary = self.summaries.get(run_id, {})
            events = self.events.get(run_id, 0)
        if known is None:
            return {"model": {**model, "bucket": None}}
        bucket = {
            "id": run_id,
            "name": run_id,
            "displayName": known.get("displayName", run_id),
            "config": known.get("config", "{}"),
            # wandb takes a run without the key "t" for one that has not begun.
            "wandbConfig": json.dumps({"t": 1}),
            "summaryMetrics": json.dumps(summary),
            "historyLineCount": len(rows),
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsLineCount": events,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": known.get("tags"),
            "notes": None,
        }
        return {"model": {**model, "bucket": bucket}}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables.get("name") or variables["id"]
        with self.lock:
            inserted = run_id not in self.runs
            given = {key: value for key, value in variables.items() if value is not None}
            known = self.runs.setdefault(run_id, {})
            known.update(given)
        entity = _named(known.get("entity") or ENTITY)
        project = {**_named(known.get("project", "none")), "entity": entity}
        bucket = {
            "id": run_id,
            "name": run_id,
            "displayName": known.get("displayName", run_id),
            "description": None,
            "config": known.get("config", "{}"),
            "sweepName": None,
            "project": project,
            "historyLineCount": len(self.rows.get(run_id, [])),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _create_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        place = f"{self.url}/upload/{variables['run']}"
        files = [{"name": name, "uploadUrl": f"{place}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a held request ends by itself, when `closing` is set
    stub: WandbStub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that hangs up is one of the cases."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        if not self._let_in():
            return
        path = self.path.split("?")[0]
        if path == "/graphql":
            self._graphql(json.loads(body))
        elif path.startswith("/files/") and path.endswith("/file_stream"):
            self.server.stub.stream(unquote(path.split("/")[-2]), json.loads(body))
            self._reply(200, {"exitcode": None, "limits": {}})
        else:
            self._reply(404, {"error": f"no such path: {path}"})

    def do_PUT(self) -> None:
        body = self._body()
        if self.server.stub.hold:
            return
        with self.server.stub.lock:
            self.server.stub.uploads[unquote(self.path.removeprefix("/upload/"))] = body
        self._reply(200, {})

    def do_GET(self) -> None:
        self._reply(404, {"error": f"no such path: {self.path}"})

    def _let_in(self) -> bool:
        """Hold the request, or refuse a wrong key."""
        stub = self.server.stub
        stub.paths.append(self.path)
        stub.asked.set()
        if stub.hold:
            stub.closing.wait()
            self.close_connection = True
            return False
        token = base64.b64encode(f"api:{stub.key}".encode()).decode()
        if self.headers.get("Authorization") not in (f"Basic {token}", f"Bearer {stub.key}"):
            self._reply(401, {"errors": [{"message": "invalid key"}]})
            return False
        return True

    def _graphql(self, request: dict[str, Any]) -> None:
        operation = request.get("operationName") or ""
        with self.server.stub.lock:
            self.server.stub.operations.append(operation)
        data = self.server.stub.answer(operation, request.get("variables") or {})
        if data is None:
            self._reply(400, {"errors": [{"message": f"the stub does not know {operation}"}]})
        else:
            self._reply(200, {"data": data})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(pieces)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _named(name: str) -> dict[str, str]:
    return {"id": name, "name": name}


def _viewer() -> dict[str, Any]:
    return {
        "id": "viewer",
        "entity": ENTITY,
        "username": ENTITY,
        "email": "tester@example.com",
        "flags": "{}",
        "teams": {"edges": []},
    }


def isolate_wandb(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Take the user's wandb settings and keys away from this process and from those it starts."""
    for name in list(os.environ):
        if name.startswith("WANDB") or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv(FACTOR, "10")  # a busy machine takes longer than users should wait for
    home.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "")  # so that what the sink sets is taken back
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(home / name.lower()))
