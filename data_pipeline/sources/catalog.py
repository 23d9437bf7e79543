"""Sources by name: the built-in catalogue, the user's YAML files, and plug-ins.

A plug-in is an entry point of the group `spikescale.sources` whose object is called without
arguments and returns a catalogue entry (a mapping as in catalog.yaml) or a `Source`.
"""

import importlib.metadata
import importlib.resources
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from spikescale.data_pipeline.sources.archive import extract_cached
from spikescale.data_pipeline.sources.base import ReadOptions, Source, SourceInfo
from spikescale.data_pipeline.sources.fetch import Package, fetch
from spikescale.data_pipeline.sources.files import LOCAL_FILES, FilesSource
from spikescale.data_pipeline.sources.hub import HubData, HubSource
from spikescale.data_pipeline.storage import is_url
from spikescale.errors import UserError

ENTRY_POINT_GROUP = "spikescale.sources"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Hub(_Strict):
    """The `hub` part of an entry: what `datasets.load_dataset` is given."""

    path: str
    config: str | None = None
    revision: str | None = None
    data_files: list[str] = []
    row_start: str | None = None


class Splits(_Strict):
    """The data set's own splits that become the ones here."""

    train: str
    valid: str | None = None
    test: str | None = None


class Entry(_Strict):
    """One source of a catalogue; catalog.yaml explains the keys."""

    summary: str = ""
    licence: str = "not stated"
    documents: int | None = None
    text_bytes: int | None = None
    package: Package | None = None
    members: str | None = None
    hub: Hub | None = None
    files: list[str] | str | None = None
    split: str = "train"
    splits: Splits | None = None
    text_key: str | None = None
    split_on: str | None = None
    format: Literal["text", "jsonl", "parquet"] | None = None
    encoding: str | None = None
    invalid_bytes: Literal["refuse", "replace"] | None = None
    partition_bytes: int | None = None
    split_by: Literal["hash", "position"] | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "Entry":
        origins = [name for name in ("package", "hub", "files") if getattr(self, name) is not None]
        if len(origins) != 1:
            raise ValueError("give exactly one of package, hub, files")
        if (self.package is None) != (self.members is None):
            raise ValueError("package and members belong together")
        if self.splits is not None and self.hub is None:
            raise ValueError("splits is for hub data sets only")
        if self.splits is not None and self.split_by is not None:
            raise ValueError("splits and split_by exclude each other")
        return self


def list_sources(catalogs: Sequence[Path] = ()) -> list[SourceInfo]:
    """Every source that has a name, in the order built-in, hub, user's, plug-ins."""
    listed = [_describe(name, entry) for name, (entry, _) in _entries(catalogs).items()]
    plugins = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return listed + [
        SourceInfo(point.name, "plug-in", f"from {point.value}", "?", "?", "installed") for point in plugins
    ]


def open_source(
    words: Sequence[str], options: ReadOptions | None = None, catalogs: Sequence[Path] = (), **given: Any
) -> Source:
    """The source that `words` name: one name of the catalogue, or files, globs and folders.

    `given` holds the reading options that the user set; they win over the catalogue's. What must be
    downloaded is downloaded here, once. Raises UserError for an unknown name or path.
    """
    options = replace(options or ReadOptions(), **given)
    entries = _entries(catalogs)
    plugins = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    named = [word for word in words if word in entries or word in plugins]
    if named and len(words) > 1:
        raise UserError(f"--source: give one name ({named[0]}), or only files, not several at once")
    if not named:
        for word in words:
            if "/" not in word and "*" not in word and not Path(word).exists():
                names = ", ".join([*entries, *plugins])
                raise UserError(f"--source {word}: neither a file or folder nor one of {names}")
        return FilesSource(LOCAL_FILES, words, options)
    name = named[0]
    if name in plugins:
        made = plugins[name].load()()
        if not isinstance(made, dict):
            source: Source = made
            return source
        return _open_entry(name, _validated(name, made, plugins[name].value), Path.cwd(), given)
    entry, folder = entries[name]
    return _open_entry(name, entry, folder, given)


def _open_entry(name: str, entry: Entry, folder: Path, given: dict[str, Any]) -> Source:
    keys = ("text_key", "split_on", "format", "encoding", "invalid_bytes", "partition_bytes")
    chosen = {key: getattr(entry, key) for key in keys if getattr(entry, key) is not None}
    options = replace(ReadOptions(), **{**chosen, **given})
    if entry.package is not None:
        assert entry.members is not None
        extracted = extract_cached(fetch(entry.package), entry.members, entry.package.sha256)
        identity = f"{entry.package.sha256} {entry.members}"
        return FilesSource(name, [extracted], options, content_id=identity, split_by=entry.split_by)
    if entry.files is not None:
        paths = [entry.files] if isinstance(entry.files, str) else entry.files
        found = [path if is_url(path) else folder / path for path in paths]
        return FilesSource(name, found, options, split_by=entry.split_by)
    assert entry.hub is not None
    parts: list[tuple[str, str | None]] = [(entry.split, None)]
    if entry.splits is not None:
        own = (("train", entry.splits.train), ("valid", entry.splits.valid), ("test", entry.splits.test))
        parts = [(theirs, ours) for ours, theirs in own if theirs is not None]
    hub = entry.hub
    return HubSource(
        name,
        [
            (
                HubData(
                    path=hub.path,
                    config=hub.config,
                    split=theirs,
                    revision=hub.revision,
                    data_files=tuple(hub.data_files),
                    text_key=options.text_key,
                    row_start=hub.row_start,
                    metadata_keys=options.metadata_keys,
                    name=name,
                    split_on=options.split_on,
                    bad_records=options.bad_records,
                    max_record_bytes=options.max_record_bytes,
                ),
                ours,
            )
            for theirs, ours in parts
        ],
        split_by=entry.split_by,
    )


def _entries(catalogs: Sequence[Path]) -> dict[str, tuple[Entry, Path]]:
    resource = importlib.resources.files(__package__) / "catalog.yaml"
    entries = _parse(resource.read_text(encoding="utf-8"), "catalog.yaml", Path.cwd())
    for path in catalogs:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--catalog {path}: cannot be read ({error})") from None
        entries.update(_parse(text, str(path), path.parent))
    return entries


def _parse(text: str, origin: str, folder: Path) -> dict[str, tuple[Entry, Path]]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{origin}: must map source names to their settings")
    return {str(name): (_validated(str(name), entry, origin), folder) for name, entry in content.items()}


def _validated(name: str, content: Any, origin: str) -> Entry:
    try:
        return Entry.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([name, *map(str, first["loc"])])
        reason = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
        if first["type"] == "extra_forbidden":
            reason = f"unknown key; allowed: {', '.join(Entry.model_fields)}"
        raise UserError(f"{origin}: {key}: {reason}") from None


def _describe(name: str, entry: Entry) -> SourceInfo:
    size = "?" if entry.text_bytes is None else _human(entry.text_bytes)
    if entry.documents is not None:
        size += f", {entry.documents:,} docs"
    if entry.package is not None:
        needs = f"{entry.package.program}, {_human(entry.package.bytes)} download"
        return SourceInfo(name, "built-in", entry.summary, size, entry.licence, needs)
    if entry.hub is not None:
        return SourceInfo(name, "hub", entry.summary, size, entry.licence, "network (HF hub), streamed")
    return SourceInfo(name, "files", entry.summary, size, entry.licence, "local files")


def _human(count: int) -> str:
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"
