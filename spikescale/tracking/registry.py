"""Models in MLflow: a finished run's model as an artifact and a version in the registry, and the way back.

The artifacts `model/step-N` of a run are model folders (model/store.py), which stand on their own. The
registry's version points at one of them and carries its metrics as tags.
"""

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from spikescale.errors import UserError
from spikescale.files import cache_folder, sha256_text, temporary_path
from spikescale.tracking.mlflow_store import default_store, open_client, probe, shown

ARTIFACT, STEP = "model", "step-"
SCHEMES = ("runs:/", "models:/")
STORE = "MLFLOW_TRACKING_URI"


def is_model_uri(text: str) -> bool:
    """Whether a model is named as MLflow does: runs:/ID, models:/NAME, models:/NAME/VERSION or @ALIAS."""
    return text.startswith(SCHEMES)


def store_address() -> str:
    """The store that model addresses refer to: $MLFLOW_TRACKING_URI, or runs/mlflow.db."""
    return os.environ.get(STORE) or default_store(Path("runs"))


def register(client: Any, run_id: str, folder: Path, name: str, tags: Mapping[str, str]) -> None:
    """Store a model folder with a run and make a version of `name` of it, once for each (run, step).

    tags: of the version; `step` among them. Raises what MLflow raises.
    """
    from mlflow.exceptions import MlflowException

    versions = client.search_model_versions(f"run_id = '{run_id}'")
    if any(version.name == name and version.tags.get("step") == tags["step"] for version in versions):
        return
    path = f"{ARTIFACT}/{STEP}{tags['step']}"
    client.log_artifacts(run_id, str(folder), path)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(run_id).info.artifact_uri}/{path}"
    client.create_model_version(name, source, run_id, tags=dict(tags))


def fetch_model(address: str) -> Path:
    """The folder of a model that MLflow has, on this machine. Raises UserError, naming the address.

    Where the artifacts are files here, theirs; else a copy, fetched once, below the cache folder.
    """
    from mlflow.exceptions import MlflowException

    store = store_address()
    where = f"{address} in {shown(store)} (set {STORE} for another store)"
    try:
        if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).is_file():
            raise UserError(f"{where}: no such store")
        probe(store)
        client = open_client(store)
        run_id, path = _run_and_path(client, address)
        place = f"{client.get_run(run_id).info.artifact_uri}/{path}"
        local = _local(place)
        if local is not None:
            if not local.is_dir():
                raise UserError(f"{where}: its run {run_id} has no artifact {path}")
            return local
        return _copied(client, run_id, path, place)
    except (MlflowException, OSError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())[:200]}") from None


def _run_and_path(client: Any, address: str) -> tuple[str, str]:
    scheme, _, rest = address.partition(":/")
    first, _, more = rest.strip("/").partition("/")
    if not first:
        raise UserError(
            f"{address}: write runs:/ID, models:/NAME/VERSION, models:/NAME@ALIAS or models:/NAME"
        )
    if scheme == "runs":
        return first, more or _newest(client, first)
    name, _, alias = first.partition("@")
    if alias:
        version = client.get_model_version_by_alias(name, alias)
    elif more:
        version = client.get_model_version(name, more)
    else:
        versions = client.search_model_versions(f"name = '{name}'")
        if not versions:
            known = ", ".join(sorted(model.name for model in client.search_registered_models()))
            raise UserError(f"{address}: no model of this name; there are {known or 'none'}")
        version = max(versions, key=lambda found: int(found.version))
    return str(version.run_id), f"{ARTIFACT}/{STEP}{version.tags.get('step')}"


def _newest(client: Any, run_id: str) -> str:
    """The path of the last model that a run stored."""
    found = [artifact.path for artifact in client.list_artifacts(run_id, ARTIFACT)]
    steps = {path: path.rpartition(STEP)[2] for path in found}
    numbered = [path for path, step in steps.items() if step.isdigit()]
    return max(numbered, key=lambda path: int(steps[path]), default=ARTIFACT)


def _local(place: str) -> Path | None:
    parts = urlsplit(place)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return Path(place) if not parts.scheme else None


def _copied(client: Any, run_id: str, path: str, place: str) -> Path:
    folder = cache_folder("mlflow") / sha256_text(place)[:32]
    if not folder.is_dir():
        aside = temporary_path(folder)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            found = Path(client.download_artifacts(run_id, path, str(aside)))
            with contextlib.suppress(FileExistsError):
                found.replace(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder
