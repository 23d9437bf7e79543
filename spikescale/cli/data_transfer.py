"""`spikescale data push` and `data pull`: prepared data to and from remote storage."""

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

from spikescale.errors import UserError

EXAMPLES = """examples:
  spikescale data push data/shakespeare s3://my-bucket/shakespeare
  spikescale data pull s3://my-bucket/shakespeare data/copy
  AWS_ENDPOINT_URL=http://127.0.0.1:9000 spikescale data push data/mine s3://bucket/mine --jobs 16

Credentials come from where the protocol's library looks: the environment and its standard files."""


def add_push(parser: argparse.ArgumentParser) -> None:
    """Fill in the options of `data push`."""
    parser.add_argument("folder", type=Path, help="what `data prepare` wrote")
    parser.add_argument("url", metavar="URL", help="where it goes, such as s3://bucket/folder")
    parser.add_argument("--overwrite", action="store_true", help="replace another data set that is there")
    _add_common(parser)


def add_pull(parser: argparse.ArgumentParser) -> None:
    """Fill in the options of `data pull`."""
    parser.add_argument("url", metavar="URL", help="what `data push` wrote, such as s3://bucket/folder")
    parser.add_argument("folder", type=Path, help="where it goes")
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=8, metavar="N", help="files that are copied at once")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _run(arguments: argparse.Namespace, push: bool) -> int:
    from spikescale.data_pipeline import transfer
    from spikescale.data_pipeline.storage import shown

    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: must be at least 1")
    began = time.monotonic()
    folder, url, jobs, quiet = arguments.folder, arguments.url, arguments.jobs, arguments.quiet
    if push:
        done = transfer.push(folder, url, jobs=jobs, overwrite=arguments.overwrite, quiet=quiet)
    else:
        done = transfer.pull(url, folder, jobs=jobs, quiet=quiet)
    print(
        f"{shown(url) if push else folder}: {done.copied} files copied, {done.kept} were there, "
        f"{done.size_bytes / 1e6:,.1f} MB in all, checksums compared; {time.monotonic() - began:.1f} s, "
        f"data set {done.manifest.sha256[:12]}"
    )
    return 0


PUSH = SimpleNamespace(
    add_arguments=add_push, run=lambda arguments: _run(arguments, push=True), EXAMPLES=EXAMPLES
)
PULL = SimpleNamespace(
    add_arguments=add_pull, run=lambda arguments: _run(arguments, push=False), EXAMPLES=EXAMPLES
)
