"""The options that benchmarks of heads on one store share."""

import argparse
from pathlib import Path


def store_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the store, its features, seeds, threads, the folder of runs and the result."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--store", type=Path, help="a complete store with splits train and val")
    parser.add_argument("--image-features", help="which, if the store has several")
    parser.add_argument("--text-features", help="which, if the store has several")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder to keep the runs in")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser


def add_finished(parser: argparse.ArgumentParser) -> None:
    """Add the option to report finished runs alone."""
    parser.add_argument(
        "--finished",
        action="store_true",
        help="fit nothing: report the finished runs in --work",
    )
