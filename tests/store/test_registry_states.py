"""Any sequence of publish, promote, rollback and remove leaves the registry where a plain model of it stands."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from adaptfleet.contracts.errors import StoreError
from adaptfleet.store.registry import Registry
from tests.store.drafts import dataset

NAMES = st.sampled_from(["a", "b"])
ALIASES = st.sampled_from(["prod", "canary"])
VERSIONS = st.integers(1, 6)


class RegistryStates(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        rows = self.folder / "rows"
        rows.mkdir()
        (rows / "rows.jsonl").write_text("{}\n")
        self.writer = Registry.open((self.folder / "store").as_uri())
        self.reader = Registry.open(self.writer.url)  # another process's view, with records and a snapshot of its own
        self.live: dict[str, set[int]] = {"a": set(), "b": set()}
        self.claimed = {"a": 0, "b": 0}
        self.history: dict[tuple[str, str], list[int]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(name=NAMES, alias=ALIASES | st.none())
    def publish(self, name: str, alias: str | None) -> None:
        manifest = self.writer.publish(dataset(name), self.folder / "rows", alias)
        self.claimed[name] += 1
        assert manifest.version == self.claimed[name]
        self.live[name].add(manifest.version)
        if alias is not None:
            self.history.setdefault((name, alias), []).append(manifest.version)

    @rule(name=NAMES, alias=ALIASES, version=VERSIONS)
    def promote(self, name: str, alias: str, version: int) -> None:
        if version not in self.live[name]:
            with pytest.raises(StoreError):
                self.writer.set_alias(name, alias, version)
            return
        self.writer.set_alias(name, alias, version)
        history = self.history.setdefault((name, alias), [])
        if not history or history[-1] != version:
            history.append(version)

    @rule(name=NAMES, alias=ALIASES)
    def rollback(self, name: str, alias: str) -> None:
        history = self.history.get((name, alias), [])
        earlier = history[:-1]
        while earlier and (earlier[-1] not in self.live[name] or earlier[-1] == history[-1]):
            earlier.pop()
        if not earlier:
            with pytest.raises(StoreError):
                self.writer.rollback(name, alias)
            return
        assert self.writer.rollback(name, alias).version == earlier[-1]
        self.history[name, alias] = earlier

    @rule(name=NAMES, version=VERSIONS)
    def remove_version(self, name: str, version: int) -> None:
        pointed = {history[-1] for (owner, _), history in self.history.items() if owner == name and history}
        if version not in self.live[name] or version in pointed:
            with pytest.raises(StoreError):
                self.writer.remove(name, version)
            return
        self.writer.remove(name, version)
        self.live[name].discard(version)

    @invariant()
    def both_views_agree_with_the_model(self) -> None:
        published = {name for name, versions in self.live.items() if versions}
        for registry in (self.writer, self.reader):
            assert set(registry.names()) == published
            for name in published:
                aliases = {alias: history[-1] for (owner, alias), history in self.history.items() if owner == name and history}
                assert registry.versions(name) == sorted(self.live[name])
                assert registry.aliases(name) == aliases
                listing = registry.snapshot()[name]
                assert (list(listing.versions), dict(listing.aliases)) == (sorted(self.live[name]), aliases)


RegistryStates.TestCase.settings = settings(
    max_examples=12, stateful_step_count=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestRegistryStates = RegistryStates.TestCase
