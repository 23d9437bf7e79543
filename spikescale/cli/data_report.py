"""`spikescale data report`: an HTML page about prepared data."""

import argparse
from pathlib import Path

EXAMPLES = """examples:
  spikescale data report data/mine
  spikescale data report data/mine --output reports/mine.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill in the options."""
    parser.add_argument("folder", type=Path, help="what `data prepare` wrote")
    parser.add_argument(
        "--output", type=Path, metavar="HTML", help="where the page goes (default: FOLDER/report.html)"
    )
    parser.add_argument(
        "--verify", choices=("full", "size", "none"), default="size", help="check checksums, or sizes only"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    from spikescale.data_pipeline.clean.report import write_report
    from spikescale.data_pipeline.manifest import load_manifest

    manifest = load_manifest(arguments.folder, verify=arguments.verify)
    page, *pictures = write_report(manifest, arguments.output or arguments.folder / "report.html")
    print(f"report: {page}, with {len(pictures)} pictures beside it")
    return 0
