"""Fetching from the model hub: its own client against a local server, what is chosen, what goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import sfumato
from sfumato import cli
from sfumato.checkpoints.pulling import wanted

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef" * 2 + "01234567"
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": [None, None],
}
NET = "diffusion_pytorch_model"
PIPELINE = [
    *("model_index.json", "README.md", "v1.safetensors", "scheduler/scheduler_config.json"),
    *("tokenizer/vocab.json", "tokenizer/merges.txt", "text_encoder/config.json"),
    *("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", "unet/config.json"),
    *(f"unet/{NET}.safetensors.index.json", f"unet/{NET}-00001-of-00002.safetensors"),
    *(f"unet/{NET}-00002-of-00002.safetensors", f"unet/{NET}.fp16.safetensors", f"unet/{NET}.onnx"),
    *("vae/config.json", f"vae/{NET}.bin", f"vae/{NET}.fp16.bin", f"vae/{NET}.fp16.safetensors"),
    *("safety_checker/config.json", "safety_checker/model.safetensors"),
]
FULL = [
    *("text_encoder/model.safetensors", f"unet/{NET}-00001-of-00002.safetensors"),
    *(f"unet/{NET}-00002-of-00002.safetensors", f"unet/{NET}.safetensors.index.json", f"vae/{NET}.bin"),
]
HALF = ["text_encoder/model.safetensors", f"unet/{NET}.fp16.safetensors", f"vae/{NET}.fp16.safetensors"]


class Hub(ThreadingHTTPServer):
    """Serves what the client asks of a hub: a list of files, their heads and bytes."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.lies: set[str] = set()  # files of which it states another digest
        self.given: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.strip("/").removeprefix("api/models/").split("/", 3)
        name, what, rest = "/".join(path[:2]), path[2], path[3]
        if name not in self.server.repositories:
            return self.answer(401, {})
        revision = rest.split("/")[0]
        if name == "org/closed":
            return self.answer(403, {})
        if name == "org/gated" and what == "resolve":
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if revision not in ("main", "v1", COMMIT):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        files = self.server.repositories[name]
        if what == "resolve":
            content = files[rest.partition("/")[2]]
            if self.command == "GET":
                self.server.given.append(rest.partition("/")[2])
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": etag}, content)
        listed = [self.entry(file, content) for file, content in files.items()]
        told = listed if what == "tree" else {"id": name, "sha": COMMIT, "siblings": listed}
        return self.answer(200, {"Content-Type": "application/json"}, json.dumps(told).encode())

    do_HEAD = do_GET

    def entry(self, file: str, content: bytes) -> dict[str, object]:
        digest = hashlib.sha256(content + b"!" * (file in self.server.lies)).hexdigest()
        lfs = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 130}
        own = {"lfs": lfs} if file.endswith((".safetensors", ".bin")) else {}
        return {"type": "file", "path": file, "rfilename": file, "size": len(content), "oid": digest, **own}

    def answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


DRIVER = """
import contextlib, io, json, sys
from sfumato import cli
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(command)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
Said = list[tuple[int, str, str]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(hub: Hub, tmp_path: Path, repository: Path) -> Callable[..., Said]:
    """Commands in a process of their own, for the client reads its environment when it is imported."""

    def commands(*lines: str) -> Said:
        own = {
            **{"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"},
            **{"HF_HOME": str(tmp_path), "PYTHONPATH": str(repository), "HF_HUB_DISABLE_TELEMETRY": "1"},
        }
        env = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | own
        given = json.dumps([line.split() for line in lines])
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, given], env=env, capture_output=True, text=True, check=True
        )
        return [tuple(json.loads(row)) for row in done.stdout.splitlines()]

    return commands


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_system_is_fetched_and_found_by_its_name(
    hub: Hub, run: Callable[..., Said], tiny_folder: Path, tmp_path: Path
) -> None:
    own = contents(tiny_folder)
    hub.repositories["org/tiny"] = own | {"README.md": b"x", "other/big.safetensors": b"y"}
    with pytest.raises(ValueError, match=r"no file or folder org/tiny, nor is it .*: sfumato pull org/tiny"):
        sfumato.load("org/tiny")
    (code, out, _), (again, *_) = run("pull org/tiny", "pull org/tiny@v1")
    assert (code, again) == (0, 0)
    first, *rows = out.splitlines()
    assert Path(first) == tmp_path / "cache/models--org--tiny/snapshots" / COMMIT
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in own.items()}
    assert rows == [f"{digests[n]}  {n}" for n in sorted(own) if n.endswith(".safetensors")]
    assert sorted(hub.given) == sorted(own)  # once, although two names were asked for
    expected = sfumato.load(tiny_folder).generate("red", steps=1)[0].tobytes()
    assert sfumato.load("org/tiny").generate("red", steps=1)[0].tobytes() == expected
    assert sfumato.load("org/tiny@v1").fingerprint == sfumato.load(tiny_folder).fingerprint
    assert list(sfumato.load_nets(f"org/tiny@{COMMIT}")) == list(sfumato.load_nets(tiny_folder))
    assert cli.main(["generate", "red", "--system", "org/tiny", "--steps", "1", "--out", "a.png"]) == 0


@pytest.mark.parametrize(("variant", "weights"), [(None, FULL), ("fp16", HALF)])
def test_what_is_chosen(variant: str | None, weights: list[str]) -> None:
    chosen = wanted(PIPELINE, lambda _: INDEX, variant, where="org/sd")
    texts = [n for n in PIPELINE if n.endswith((".json", ".txt")) and ".index." not in n]
    assert chosen == sorted([*weights, *(n for n in texts if not n.startswith("safety"))])


def test_a_folder_of_one_net() -> None:
    files = ["config.json", f"{NET}.fp16.safetensors", f"{NET}.safetensors", "README.md", "a/b.safetensors"]
    assert wanted(files, dict, None, where="a/b") == ["config.json", f"{NET}.safetensors"]
    assert wanted(files[:2], dict, None, where="a/b") == files[:2]  # there is no other precision


def line_of(code: int, out: str, err: str) -> str:
    """The one line of a refused command."""
    (line,) = [row for row in err.splitlines() if row.startswith("sfumato: ")]
    assert (code, out) == (2, "")
    return line


def test_the_hub_says_no_in_one_line(hub: Hub, run: Callable[..., Said]) -> None:
    """And of a pipeline only what is read is fetched."""
    config = {"config.json": b"{}", f"{NET}.safetensors": b"x"}
    hub.repositories |= {"org/net": config, "org/closed": config, "org/gated": config, "org/none": {"a": b""}}
    hub.repositories |= {
        "org/bare": {"config.json": b"{}"},
        "org/damaged": {"config.json": b"", "model.bin": b"x"},
    }
    index = {"model_index.json": json.dumps(INDEX).encode()}
    hub.repositories["org/sd"] = {name: name.encode() for name in PIPELINE} | index
    hub.lies.add("model.bin")
    expected = {
        "net": "'net' names no repository of the model hub; expected ORG/NAME",
        "org/missing": "the model hub has no repository org/missing, or it is private",
        "org/net@v2": "org/net has no revision v2; allowed: a branch, tag or commit",
        "org/gated": "org/gated is gated: accept its terms on its page, then log in",
        "org/closed": "the model hub does not give org/closed (status 403); check the login: hf auth login",
        "org/none": "org/none holds nothing that sfumato loads: no system.json, model_index.json or",
        "org/bare": "org/bare holds no weights that sfumato loads: no diffusion_pytorch_model.safetensors",
        "org/net --variant fp16": "org/net holds no weights of variant fp16; leave out --variant",
        "org/damaged": "it came damaged; remove it and pull again",
    }
    *refused, drawn = run(*(f"pull {name}" for name in expected), "pull org/sd --variant fp16")
    for told, wrong in zip(expected.values(), refused, strict=True):
        assert told in line_of(*wrong)
    assert (drawn[0], [row.split()[-1] for row in drawn[1].splitlines()[1:]]) == (0, HALF)
    asked = [name for name in hub.given if "/" in name and name.endswith((".safetensors", ".bin"))]
    assert sorted(asked) == HALF


def test_without_a_hub(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> str:
        return line_of(cli.main(["pull", "org/net"]), *capsys.readouterr())

    assert "switched off by HF_HUB_OFFLINE; unset it to pull" in said()  # as everywhere in the tests
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "the model hub cannot be reached for org/net: " in said()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'needs the package huggingface_hub: run pip install "sfumato[hub]"' in said()
