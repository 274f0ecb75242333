"""The same registry tests run on a local disk and on S3, served by a real moto server process on loopback."""

import json
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from safetensors.numpy import save_file

from adaptfleet.store.registry import Registry
from tests.store.drafts import RANK, lora_tensors


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The AWS_* variables of a running S3 server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    server = subprocess.Popen(
        [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
                time.sleep(0.05)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()


@pytest.fixture
def s3_url(s3_endpoint: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket's URL, the AWS_* variables set."""
    for key, value in s3_endpoint.items():
        monkeypatch.setenv(key, value)
    bucket = f"b{uuid.uuid4().hex}"
    boto3.client("s3", endpoint_url=s3_endpoint["AWS_ENDPOINT_URL"], region_name="us-east-1").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/some/prefix"


@pytest.fixture(params=["file", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return (tmp_path / "a store").as_uri()
    url: str = request.getfixturevalue("s3_url")
    return url


@pytest.fixture
def registry(store_url: str) -> Registry:
    return Registry.open(store_url)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A data set's folder."""
    folder = tmp_path / "rows"
    (folder / "more").mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    (folder / "more" / "empty file.txt").write_bytes(b"")
    return folder


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes a PEFT LoRA folder with the safetensors library; `config` lies over a plain config, `tensors` replaces the tensors."""

    def make(config: dict[str, object] | None = None, tensors: dict[str, np.ndarray] | None = None) -> Path:
        folder = tmp_path / f"adapter-{uuid.uuid4().hex}"
        folder.mkdir()
        plain = {
            "peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none", "use_dora": False,
            "modules_to_save": None, "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {},
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(plain | (config or {})))
        save_file(lora_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
        return folder

    return make
