"""`jobs/evaluate.py` from contract to record: published adapters, folders, the base and a live endpoint on the same rows."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptfleet.cli.evaluation_tables import print_outcome
from adaptfleet.contracts.artifacts import Draft
from adaptfleet.contracts.errors import AdaptfleetError, ContractError, ModelError, ServingError
from adaptfleet.contracts.evaluating import EvaluateJob
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.core.data.rows import read_rows
from adaptfleet.core.models.loading import base_revision
from adaptfleet.on_ray.evaluate.evaluation import run_evaluation
from adaptfleet.store.registry import Registry

Make = Callable[..., EvaluateJob]


@pytest.fixture
def make_job(fresh_home: Path, tiny_base: Path, sums_file: Path) -> Make:
    def make(*subjects: Any, **values: Any) -> EvaluateJob:
        job = {
            "subjects": list(subjects),
            "model": {"source": str(tiny_base), "dtype": "float32"},
            "rows": str(sums_file),
            "max_rows": 6,
            "max_new_tokens": 6,
            "num_resamples": 200,
        }
        return parse_contract(EvaluateJob, yaml.safe_dump(job | values))

    return make


@pytest.fixture
def registry(make_job: Make, tiny_base: Path, tiny_adapter: Path) -> Registry:
    """Holds the adapter `sums`, made on the base."""
    registry = Registry.open()
    draft = Draft(
        kind="adapter", name="sums", base="tiny-llama", base_revision=base_revision(tiny_base), method={"kind": "lora", "rank": 4}
    )
    registry.publish(draft, tiny_adapter)
    return registry


def test_a_published_adapter_beside_its_base(
    registry: Registry, make_job: Make, tiny_base: Path, tiny_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = registry.resolve("sums")
    outcome = run_evaluation(make_job("base", "sums"))
    assert list(outcome.metrics) == ["base", "sums@1"]
    names = {"exact_match", "field_f1", "valid_json", "rouge_1", "rouge_2", "rouge_l", "perplexity"}
    assert set(outcome.metrics["sums@1"]) == names and set(outcome.comparisons[0].differences) == names
    for found in outcome.metrics.values():
        assert all(m.low <= m.value <= m.high for m in found.values())
    perplexity = outcome.comparisons[0].differences["perplexity"]
    assert perplexity.value == pytest.approx(outcome.metrics["sums@1"]["perplexity"].value - outcome.metrics["base"]["perplexity"].value)
    assert perplexity.value != 0

    lines = [json.loads(line) for line in (outcome.folder / "rows.jsonl").read_text().splitlines()]
    assert [(line["subject"], line["row"]) for line in lines] == [(s, i) for s in ("base", "sums@1") for i in range(6)]
    assert json.loads((outcome.folder / "results.json").read_text())["num_rows"] == 6
    # The adapter's answer is what peft and transformers give on their own.
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(tiny_adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    line = lines[8]
    inputs = tokenizer.apply_chat_template(line["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert line["answer"] == tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    (record,) = registry.evaluations("sums@1")
    assert record.metrics == outcome.metrics["sums@1"] and record.run == outcome.folder.name and record.num_rows == 6
    assert registry.resolve("sums@1") == before
    run_evaluation(make_job("sums", max_rows=2))
    assert [r.num_rows for r in registry.evaluations("sums")] == [6, 2]

    capsys.readouterr()
    print_outcome(outcome)
    shown = capsys.readouterr().out
    assert "sums@1 less base, on the same rows" in shown and "difference\t95% interval\tp" in shown and "sums@1\tperplexity\t" in shown


def test_a_published_model_and_folders_are_what_they_hold(registry: Registry, make_job: Make, tiny_base: Path, tiny_adapter: Path) -> None:
    registry.publish(Draft(kind="model", name="whole"), tiny_base)
    outcome = run_evaluation(make_job("base", "whole", f"{tiny_base}", f"{tiny_adapter}", "sums", record=False))
    base, whole, folder, adapter, published = outcome.metrics.values()
    assert base == whole == folder and adapter == published and adapter != base
    assert [c.differences["perplexity"].p_value for c in outcome.comparisons[:2]] == [1.0, 1.0]
    assert registry.evaluations("whole") == []


def test_all_that_cannot_be_scored_is_told_before_anything_is_loaded(
    registry: Registry, make_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    endpoint = {"kind": "endpoint", "url": "http://127.0.0.1:9", "model": "x"}
    with pytest.raises(AdaptfleetError) as told:
        subjects = ("sum", "./nowhere", endpoint, endpoint | {"model": "y", "api_key_env": None})
        run_evaluation(make_job(*subjects, rows=str(tmp_path / "no.jsonl"), lm_eval={"tasks": ["arc_easy"]}))
    for fact in (
        "pip install lm-eval",
        "no file",
        "Did you mean 'sums'",
        "./nowhere is no folder",
        "OPENAI_API_KEY holds no API key",
        "cannot be reached",
    ):
        assert fact in str(told.value)


def test_an_adapter_is_not_scored_on_another_base(registry: Registry, make_job: Make, tiny_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="was trained on tiny-llama of the revision"):
        run_evaluation(make_job("sums", model={"source": str(other)}))


def test_an_adapter_with_tensors_that_have_no_place_is_refused(make_job: Make, tiny_adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "adapter_config.json").write_text((tiny_adapter / "adapter_config.json").read_text())
    tensors = {
        name.replace("layers.0", "layers.7"): tensor for name, tensor in load_file(tiny_adapter / "adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"does not fit .*layers\.0"):
        run_evaluation(make_job(str(folder)))


def test_one_version_by_two_names_is_refused(registry: Registry, make_job: Make) -> None:
    with pytest.raises(ContractError, match="sums@1 is named more than once"):
        run_evaluation(make_job("sums", "sums@1"))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"subjects": []}, "subjects is empty"),
        ({"subjects": ["a", "a"]}, "names a@prod more than once|names a more than once"),
        ({"answers": False, "perplexity": False}, "nothing would be measured"),
        ({"lm_eval": {"tasks": []}}, "tasks is empty"),
        ({"data": {"train": "name-json"}}, "rows and data are both given"),
        ({"subjects": [{"kind": "endpoint", "url": "ftp://x", "model": "m"}]}, r"subjects\.0\.url"),
        ({"subjects": [{"kind": "endpoint", "url": "http://x", "model": "m", "modle": 1}]}, "modle: unknown key"),
    ],
)
def test_contracts_that_cannot_be(make_job: Make, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ContractError, match=says):
        make_job("base", **values)


def test_a_contract_is_read_back_from_what_it_is_written_as(make_job: Make) -> None:
    job = make_job("base", "sums@2", "./folder", {"kind": "endpoint", "url": "http://x", "model": "m"})
    assert EvaluateJob.model_validate_json(job.model_dump_json(), strict=False) == job


class Endpoint(ThreadingHTTPServer):
    """Speaks OpenAI's protocol for one model, `adder`, which adds; it refuses a busy first try of each question, as a loaded one does."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.tried: set[str] = set()
        self.in_flight = self.most_in_flight = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"content-type": "application/json", "content-length": str(len(content)), "retry-after-ms": "1"}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def refused(self) -> bool:
        if self.headers.get("authorization") == "Bearer right":
            return False
        self.reply(401, {"error": {"message": "wrong key"}})
        return True

    def do_GET(self) -> None:
        if not self.refused():
            self.reply(200, {"object": "list", "data": [{"id": "adder", "object": "model", "created": 0, "owned_by": "tests"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.refused():
            return
        if asked["model"] != "adder":
            self.reply(404, {"error": {"message": "no such model"}})
            return
        question = asked["messages"][-1]["content"]
        with self.server.lock:
            first_try = question not in self.server.tried
            self.server.tried.add(question)
        if first_try:
            self.reply(429, {"error": {"message": "busy"}})
            return
        with self.server.lock:
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        try:
            a, b = map(int, question.split("+"))
            # 0 is answered wrongly, and each answer is given in another way than expected
            answer = json.dumps({"sum": a + b if a else "?"}, indent=1)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
            self.reply(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "adder", "choices": [choice]})
        finally:
            with self.server.lock:
                self.server.in_flight -= 1


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    with Endpoint() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_live_endpoint_answers_in_the_rows_order(endpoint: Endpoint, make_job: Make, sums_file: Path) -> None:
    subject = {"kind": "endpoint", "url": endpoint.url, "model": "adder", "concurrency": 4}
    outcome = run_evaluation(make_job(subject, max_rows=None))
    (found,) = outcome.metrics.values()
    rows = read_rows(sums_file)
    wrong = sum(row.prompt[-1].content.startswith("0+") for row in rows)
    assert found["exact_match"].value == pytest.approx(1 - wrong / len(rows)) and found["valid_json"].value == 1.0
    assert "perplexity" not in found and endpoint.most_in_flight <= 4
    for line in map(json.loads, (outcome.folder / "rows.jsonl").read_text().splitlines()):
        a, b = map(int, line["prompt"][-1]["content"].split("+"))
        assert json.loads(line["expected"]) == {"sum": a + b} and json.loads(line["answer"]) == {"sum": a + b if a else "?"}
        assert line["scores"]["exact_match"] == float(a > 0)


def test_what_an_endpoint_refuses_is_told(endpoint: Endpoint, make_job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = {"kind": "endpoint", "url": f"{endpoint.url}/v1", "model": "addr"}
    with pytest.raises(ServingError, match=r"knows no model 'addr': no such model Did you mean 'adder'\? It lists adder\."):
        run_evaluation(make_job(subject))
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(ServingError, match="The key in OPENAI_API_KEY is not taken"):
        run_evaluation(make_job(subject))


def test_plain_texts_have_a_perplexity_alone(make_job: Make, endpoint: Endpoint, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "What is one and two?"}\n{"text": "It is three."}\n')
    outcome = run_evaluation(make_job("base", rows=str(file)))
    assert set(outcome.metrics["base"]) == {"perplexity"}
    with pytest.raises(AdaptfleetError, match="plain texts"):
        run_evaluation(make_job({"kind": "endpoint", "url": endpoint.url, "model": "adder"}, rows=str(file)))
