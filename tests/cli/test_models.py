"""`adaptfleet models`, `promote`, `rollback` and `publish`, as a user calls them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adaptfleet.cli import COMMANDS, main
from adaptfleet.contracts.artifacts import Draft
from adaptfleet.store.registry import Registry
from tests.store.test_evaluations import record


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A store with `tickets`, versions 1 and 2, and `derived`, made from version 1."""
    monkeypatch.setenv("ADAPTFLEET_STORE", (tmp_path / "store").as_uri())
    monkeypatch.setenv("ADAPTFLEET_HOME", str(tmp_path / "home"))
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("{}\n")
    registry = Registry.open()
    for draft in (
        Draft(kind="dataset", name="tickets"),
        Draft(kind="dataset", name="tickets", metrics={"exact_match": 0.5}),
        Draft(kind="dataset", name="derived", parents=("tickets@1", "elsewhere@2")),
    ):
        registry.publish(draft, folder)
    return registry


def test_list(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list"]) == 0
    header, *rows = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert header[:4] == ["name", "kind", "latest", "aliases"]
    assert [row[:4] for row in rows] == [["derived", "dataset", "1", "prod=1"], ["tickets", "dataset", "2", "prod=2"]]
    assert main(["models", "list", "--json", "--kind", "dataset"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["versions"], row["aliases"]) for row in listed] == [
        ("derived", [1], {"prod": 1}),
        ("tickets", [1, 2], {"prod": 2}),
    ]
    assert main(["models", "list", "--kind", "adapter"]) == 0
    assert "Nothing of the kind adapter is published" in capsys.readouterr().err


def test_show(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "show", "derived"]) == 0
    shown = capsys.readouterr().out
    for text in ("artifact\tderived@1", "rows.jsonl\t3\t", "  tickets@1 (dataset)", "  elsewhere@2 (not in this registry)"):
        assert text in shown
    assert main(["models", "show", "derived@1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lineage"]["parents"][0] == {"reference": "tickets@1", "published": True, "parents": []}


def test_show_has_the_evaluations(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    registry.add_evaluation("tickets@1", record(exact_match=0.75))
    assert main(["models", "show", "tickets@1"]) == 0
    assert "\taddress-json\t150\texact_match 0.75 [0.7, 0.8]" in capsys.readouterr().out
    assert main(["models", "show", "tickets@1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["evaluations"][0]["metrics"]["exact_match"]["value"] == 0.75


def test_promote_and_rollback_in_both_spellings(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["promote", "tickets@1"]) == 0
    assert capsys.readouterr().out == "tickets@prod -> tickets@1\n"
    assert main(["models", "promote", "tickets@2", "--alias", "canary"]) == 0
    assert registry.aliases("tickets") == {"prod": 1, "canary": 2}
    assert main(["promote", "tickets@canary"]) == 0
    assert registry.aliases("tickets")["prod"] == 2
    assert main(["rollback", "tickets"]) == 0
    assert main(["models", "rollback", "tickets", "--json"]) == 0
    assert registry.aliases("tickets")["prod"] == 2


def test_a_promotion_that_meets_what_is_required(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    main(["promote", "tickets@1"])
    assert main(["promote", "tickets@2", "--require", "exact_match>=0.5", "--require", "exact_match<0.6"]) == 0
    assert registry.aliases("tickets")["prod"] == 2
    assert main(["promote", "tickets@1", "--require", "exact_match>=0.5"]) == 2
    assert registry.aliases("tickets")["prod"] == 2


def test_rm(registry: Registry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["models", "rm", "tickets@1"]) == 0
    assert registry.versions("tickets") == [2]
    with Path("/dev/null").open() as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        assert main(["models", "rm", "tickets"]) == 2
    assert "Add --yes" in capsys.readouterr().err and registry.versions("tickets") == [2]
    assert main(["models", "rm", "tickets", "--yes"]) == 0
    assert registry.names() == ["derived"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["models", "show", "ticket"], "Did you mean 'tickets'"),
        (["models", "show", "../../x"], "no safe name"),
        (["models", "rm", "tickets@2"], "prod points to it"),
        (["models", "rm", "tickets@prod"], "is an alias"),
        (["promote", "tickets"], "there is tickets@1, tickets@2"),
        (["promote", "tickets@9"], "does not exist"),
        (["promote", "tickets@1", "--alias", "7"], "numbers are versions"),
        (["promote", "tickets@1", "--require", "exact_match>=0.4"], "exact_match is not known of it"),
        (["promote", "tickets@2", "--require", "exact_match>=0.8"], "exact_match is 0.5 (measured when it was made), but"),
        (["promote", "tickets@2", "--require", "exact_match"], "is not of the form"),
        (["rollback", "derived"], "pointed nowhere else before"),
        (["models", "--store", "ftp://x", "list"], "begins with none of"),
        (["publish", "dataset", "/nowhere", "--name", "x"], "it is no folder"),
        (["publish", "dataset", "/nowhere", "--name", "../x"], "no safe name"),
        (["publish", "adapter", "/nowhere", "--name", "x"], "base is missing"),
        (["publish", "adapter", "/nowhere", "--name", "x", "--base", "smollm2-135m"], "no adapter's config"),
    ],
)
def test_what_a_user_can_mend_is_said_without_a_traceback(
    registry: Registry, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and reason in printed.err
    assert "Traceback" not in printed.err and printed.out == ""


def test_publish(registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", "dataset", str(tmp_path / "rows"), "--name", "more", "--no-alias", "--parent", "tickets@2"]) == 0
    assert capsys.readouterr().out == "more@1\n"
    assert registry.aliases("more") == {} and registry.resolve("more@1").parents == ("tickets@2",)


def test_the_publish_job(registry: Registry, tmp_path: Path) -> None:
    """The job as it is submitted: a contract, checked by --dry-run, then run."""
    config = tmp_path / "job.yaml"
    config.write_text(f"job: publish\nkind: dataset\nfolder: {tmp_path / 'rows'}\nname: by-job\n")
    words = [sys.executable, str(Path(__file__).parents[2] / "jobs" / "publish.py"), "--config", str(config)]
    dry = subprocess.run([*words, "--dry-run"], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(dry.stdout)["alias"] == "prod" and registry.versions("by-job") == []
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "by-job@1\n" and registry.resolve("by-job").kind == "dataset"
    wrong = subprocess.run([*words, "--set", "nam=x"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "Did you mean 'name'" in wrong.stderr and "Traceback" not in wrong.stderr


def test_help_teaches_and_imports_no_framework(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom adaptfleet.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert end.code == 0\n"
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers') if name in sys.modules])\n"
    )
    for words, texts in {
        ("--help",): [*COMMANDS, "The usual road", "ADAPTFLEET_STORE"],
        ("models", "--help"): ["list", "show", "promote", "rollback", "rm"],
        ("publish", "--help"): ["save_pretrained"],
    }.items():
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.endswith("[]\n")
        for text in texts:
            assert text in done.stdout


def test_a_reader_that_has_seen_enough(registry: Registry) -> None:
    words = f'{sys.executable} -c \'import sys; from adaptfleet.cli import main; sys.exit(main(["models", "show", "tickets"]))\' | true'
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {words}"], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
