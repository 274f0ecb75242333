"""The registry: immutable versions under safe names, and movable aliases."""

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from adaptfleet.contracts.artifacts import ArtifactKind, Draft, FileEntry, Manifest
from adaptfleet.contracts.errors import NotFoundError, PublishError, StoreError
from adaptfleet.contracts.evaluating import EvaluationRecord
from adaptfleet.contracts.home import store_url
from adaptfleet.contracts.names import DEFAULT_ALIAS, Reference, check_alias, check_name, near
from adaptfleet.store.aliases import Move, Step, away, forward, move_alias, not_back
from adaptfleet.store.cache import cached_folder
from adaptfleet.store.content import discard, discard_abandoned, publishable_files, upload
from adaptfleet.store.evaluations import add_evaluation, read_evaluations
from adaptfleet.store.index import Index, Listing
from adaptfleet.store.objects import Objects
from adaptfleet.store.records import AliasMove, AliasSplit, Publication, Removal, removed_key, to_bytes, version_key
from adaptfleet.store.splits import end_split, split_alias


class Registry:
    """Publishes, finds and fetches artifacts. Safe between threads and processes; pickles by its URL.

    Errors: ContractError for an unsafe name, NotFoundError with near matches, PublishError, StoreError, CorruptError.
    """

    def __init__(self, objects: Objects):
        self._objects = objects
        self._index = Index(objects)

    @classmethod
    def open(cls, url: str | None = None) -> "Registry":
        """The registry at a `file://`, `s3://`, `gs://` or `az://` URL; None: where ADAPTFLEET_STORE and ADAPTFLEET_HOME say."""
        return cls(Objects(url or store_url()))

    def __reduce__(self) -> tuple[type["Registry"], tuple[Objects]]:
        return Registry, (self._objects,)

    @property
    def url(self) -> str:
        return self._objects.url

    # reading

    def snapshot(self) -> Mapping[str, Listing]:
        """Every published name with its versions and aliases. Cheap enough to poll: one small read while nothing changes."""
        return self._index.snapshot()

    def names(self, kind: ArtifactKind | None = None) -> list[str]:
        return [name for name, listing in self.snapshot().items() if kind is None or self._kind(listing) == kind]

    def versions(self, name: str) -> list[int]:
        """Published versions, ascending. Empty for an unknown name."""
        return list(self._index.listing(check_name(name)).versions)

    def aliases(self, name: str) -> dict[str, int]:
        """Where the name's aliases point. Empty for an unknown name."""
        return dict(self._index.listing(check_name(name)).aliases)

    def resolve(self, reference: Reference | str) -> Manifest:
        """The manifest that a reference means now. NotFoundError says what there is."""
        wanted = Reference.parse(reference) if isinstance(reference, str) else reference
        listing = self._index.listing(check_name(wanted.name))
        if not listing.versions:
            raise self._index.missing(wanted.name)
        version = wanted.version if wanted.alias is None else listing.aliases.get(check_alias(wanted.alias))
        if version is None:
            known = ", ".join(f"{alias} -> {number}" for alias, number in listing.aliases.items()) or "none"
            raise NotFoundError(
                f"{wanted.name} has no alias {wanted.alias!r}.{near(str(wanted.alias), listing.aliases)} Its aliases: {known}; "
                f"its versions: {_numbers(listing.versions)}."
            )
        if version not in listing.versions:
            removed = "was removed" if version <= listing.last_claimed else "does not exist"
            raise NotFoundError(f"{wanted.name}@{version} {removed}. Its versions: {_numbers(listing.versions)}.")
        return self.manifest(wanted.name, version)

    def manifest(self, name: str, version: int) -> Manifest:
        """The manifest of a version taken from a snapshot. Immutable, so it is read from the store only once."""
        return self._index.publication(name, version).manifest

    def find(self, fingerprint: str, name: str) -> Manifest | None:
        """The newest version of `name` that the contract with this fingerprint made."""
        for version in reversed(self._index.listing(check_name(name)).versions):
            manifest = self.manifest(name, version)
            if manifest.contract_fingerprint == fingerprint:
                return manifest
        return None

    def evaluations(self, reference: Reference | str) -> list[EvaluationRecord]:
        """What evaluations of the version have found, the newest last."""
        manifest = self.resolve(reference)
        return read_evaluations(self._objects, manifest.name, manifest.version)

    def fetch(self, manifest: Manifest, cache: Path) -> Path:
        """A local folder with the artifact's files, each checked against its SHA-256; equal content is kept once.

        CorruptError names the file that differs.
        """
        listing = self._index.listing(manifest.name)
        if manifest.version not in listing.versions:
            raise NotFoundError(f"{manifest.reference} was removed or never published. Its versions: {_numbers(listing.versions)}.")
        publication = self._index.publication(manifest.name, manifest.version)
        return cached_folder(self._objects, publication.manifest, publication.upload, cache)

    # writing

    def publish(self, draft: Draft, folder: Path, alias: str | None = DEFAULT_ALIAS) -> Manifest:
        """Checks the folder, stores its files, and makes them visible in one step as the next version; then moves the alias to it.

        A reader never sees a part of a version, and a number is given once. A publisher that fails leaves nothing visible.
        """
        if alias is not None:
            check_alias(alias)
        paths = publishable_files(draft, folder)
        listing = self._index.listing(check_name(draft.name))
        kind = self._kind(listing)
        if kind not in (None, draft.kind):
            raise PublishError(
                f"{draft.name} is of the kind {kind}, not {draft.kind}: versions of one name share a kind. Choose another name."
            )
        upload_id = uuid.uuid4().hex
        try:
            files = upload(self._objects, draft.name, upload_id, folder, paths)
            manifest = self._claim(draft, upload_id, files, listing.last_claimed + 1)
        except BaseException:
            self._discard_after_failure(draft.name, upload_id)
            raise
        if alias is not None:
            self._move(draft.name, alias, not_back(manifest.version))
        else:
            self._index.announce()
        discard_abandoned(self._objects, draft.name, self._uploads(draft.name) | {upload_id})
        return manifest

    def add_evaluation(self, reference: Reference | str, record: EvaluationRecord) -> int:
        """Keeps an evaluation beside its version and returns its number. The version does not change."""
        manifest = self.resolve(reference)
        return add_evaluation(self._objects, manifest.name, manifest.version, record)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Points the alias at a version. Readers see the old or the new target, nothing between."""
        self.resolve(Reference(check_name(name), version=version))
        self._move(name, check_alias(alias), forward(version))
        if alias in self._index.listing(name).splits:  # it pointed there already, for a part of the requests
            end_split(self._objects, self._index, name, alias)
            self._index.announce()

    def split(
        self, name: str, weights: Mapping[int, float], alias: str = DEFAULT_ALIAS, shadow: int | None = None, shadow_percent: float = 100.0
    ) -> AliasSplit:
        """Lets the alias mean several versions by weight, and a shadow version get copies. Ends with the next move of the alias."""
        split = split_alias(self._objects, self._index, check_name(name), check_alias(alias), weights, shadow, shadow_percent)
        gone = split.versions - set(self._index.listing(name).versions)
        if gone:
            end_split(self._objects, self._index, name, alias)
            raise NotFoundError(f"{name}@{min(gone)} was removed while {alias} was split; {alias} stays where it was.")
        self._index.announce()
        return split

    def rollback(self, name: str, alias: str = DEFAULT_ALIAS) -> Manifest:
        """Returns the alias to where it pointed before, passing over removed versions; again and again goes further back.

        Where the alias is split, that is its own version alone: the split ends, and nothing else moves.
        """
        listing = self._index.listing(check_name(name))
        if check_alias(alias) in listing.splits:
            end_split(self._objects, self._index, name, alias)
            self._index.announce()
            return self.manifest(name, listing.aliases[alias])

        def back(now: AliasMove | None) -> Step | None:
            listing = self._index.listing(name)
            if not listing.versions:
                raise self._index.missing(name)
            if now is None or now.version is None:
                raise NotFoundError(f"{name} has no alias {alias!r}.{near(alias, listing.aliases)}")
            earlier = list(now.earlier)
            while earlier:
                version = earlier.pop()
                if version in listing.versions and version != now.version:
                    return version, tuple(earlier)
            raise NotFoundError(
                f"{name}@{alias} is version {now.version} and pointed nowhere else before. Its versions: {_numbers(listing.versions)}."
            )

        moved = self._move(check_name(name), check_alias(alias), back)
        if moved is None or moved.version is None:
            raise NotFoundError(f"{name} has no alias {alias!r}.")
        return self.manifest(name, moved.version)

    def remove(self, name: str, version: int | None = None) -> None:
        """Removes a version to which no alias points, or, without `version`, the whole name with its aliases.

        The numbers are never given again.
        """
        listing = self._index.listing(check_name(name))
        if not listing.versions:
            raise self._index.missing(name)
        if version is None:
            for alias in listing.aliases:
                move_alias(self._objects, self._index, name, alias, away)
        elif version not in listing.versions:
            raise NotFoundError(f"{name}@{version} does not exist. Its versions: {_numbers(listing.versions)}.")
        for number in listing.versions if version is None else (version,):
            self._remove_version(name, number)
        self._index.announce()

    def _remove_version(self, name: str, version: int) -> None:
        """Marks, then looks at the aliases, then deletes; `_move` works in the other order, so one of two racing calls notices."""
        self._refuse_aliased(name, version)
        key = removed_key(name, version)
        self._objects.put_new(key, to_bytes(Removal(removed_at=datetime.now(UTC))))
        try:
            self._refuse_aliased(name, version)
        except StoreError:
            self._objects.delete([key])
            raise
        discard(self._objects, name, self._index.publication(name, version).upload)

    def _refuse_aliased(self, name: str, version: int) -> None:
        listing = self._index.listing(name)
        aliases = [
            alias
            for alias, number in listing.aliases.items()
            if number == version or (alias in listing.splits and version in listing.splits[alias].versions)
        ]
        if aliases:
            raise StoreError(
                f"{name}@{version} is not removed: {', '.join(aliases)} points to it. "
                f"Promote another version first, or remove the whole name."
            )

    def _move(self, name: str, alias: str, step: Move) -> AliasMove | None:
        moved = move_alias(self._objects, self._index, name, alias, step)
        if moved is not None and moved.version is not None and moved.version not in self._index.listing(name).versions:
            removed, gone = moved.version, moved.move
            move_alias(self._objects, self._index, name, alias, lambda now: _withdraw(now, gone))
            raise NotFoundError(f"{name}@{removed} was removed while {alias} was moved to it; {alias} stays where it was.")
        self._index.announce()
        return moved

    def _claim(self, draft: Draft, upload_id: str, files: dict[str, FileEntry], version: int) -> Manifest:
        """Creates the version's record under the first free number: the one step that publishes."""
        while True:
            manifest = Manifest(**draft.model_dump(), version=version, files=files, created_at=datetime.now(UTC))
            key = version_key(draft.name, version)
            if self._objects.put_new(key, to_bytes(Publication(upload=upload_id, manifest=manifest))):
                return manifest
            taken = self._index.publication(draft.name, version)
            if taken.upload == upload_id:  # our own first attempt had succeeded, only its answer was lost
                return taken.manifest
            version += 1

    def _discard_after_failure(self, name: str, upload_id: str) -> None:
        """Deletes what a failed publication has written, unless its record stands after all."""
        try:
            if upload_id not in self._uploads(name):
                discard(self._objects, name, upload_id)
        except StoreError:
            return  # the store is out of reach: the first error is the one to show, and a later publication clears the remains

    def _uploads(self, name: str) -> set[str]:
        listing = self._index.listing(name)
        return {self._index.publication(name, version).upload for version in listing.versions}

    def _kind(self, listing: Listing) -> ArtifactKind | None:
        return self.manifest(listing.name, listing.versions[-1]).kind if listing.versions else None


def _withdraw(now: AliasMove | None, move: str) -> Step | None:
    """Takes one's own last move back."""
    if now is None or now.move != move:
        return None
    return (now.earlier[-1], now.earlier[:-1]) if now.earlier else (None, ())


def _numbers(versions: tuple[int, ...]) -> str:
    shown = [str(version) for version in versions[-20:]]
    return ("..., " if len(versions) > 20 else "") + ", ".join(shown) if shown else "none"
