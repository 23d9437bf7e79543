"""Prepared data by URL for training: fetched into a local cache and compared by checksum."""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Literal

from spikescale.data_pipeline.manifest import FILE as MANIFEST
from spikescale.data_pipeline.manifest import load_manifest
from spikescale.data_pipeline.storage import is_url, local_path
from spikescale.data_pipeline.transfer import JOBS, RemoteFolder, locked, pull_locked
from spikescale.errors import UserError
from spikescale.files import cache_folder

logger = logging.getLogger(__name__)


def localise(
    location: str | Path,
    verify: Literal["full", "size", "none"] = "full",
    jobs: int = JOBS,
    quiet: bool = True,
) -> Path:
    """The local folder of prepared data that are at `location`: a path, which is given back, or a URL.

    Data at a URL are fetched file by file into `$XDG_CACHE_HOME/spikescale/data/<hash of the data set>`,
    each compared by its SHA-256 before it gets its name, the manifest last. Processes of one machine that
    ask for the same data wait for the first of them. A copy that is there is checked as `verify` says (see
    `load_manifest`), and what is wrong in it is fetched again.

    Raises UserError for a URL without whole data, and for storage that fails for good.
    """
    text = str(location)
    if not is_url(text):
        return Path(location)
    local = local_path(text)
    if local is not None:
        return local
    remote = RemoteFolder(text)
    content = remote.read(MANIFEST)
    if content is None:
        raise UserError(f"{remote}: holds no {MANIFEST}: not (completely) written by `spikescale data push`")
    folder = cache_folder("data", _data_set(content, remote))
    with locked(folder, wait=True):
        if not _is_whole(folder, content, verify):
            pull_locked(remote, folder, jobs, quiet)
    return folder


def _data_set(content: bytes, remote: RemoteFolder) -> str:
    try:
        sha256 = str(json.loads(content)["sha256"])
    except (ValueError, KeyError, TypeError):
        sha256 = ""
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise UserError(f"{remote}/{MANIFEST}: is not the manifest of prepared data")
    # Two preparations of the same tokens may differ in their sidecars: the manifest's own bytes tell.
    return sha256[:32] + "-" + hashlib.sha256(content).hexdigest()[:8]


def _is_whole(folder: Path, content: bytes, verify: Literal["full", "size", "none"]) -> bool:
    path = folder / MANIFEST
    if not path.exists() or path.read_bytes() != content:
        path.unlink(missing_ok=True)
        return False
    try:
        load_manifest(folder, verify=verify)
    except UserError as error:
        logger.warning("%s; fetching it again", error)
        path.unlink()
        return False
    return True
