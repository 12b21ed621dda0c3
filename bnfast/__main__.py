"""``python -m bnfast``: what is available here, and why not. ``--json`` for programs."""

from __future__ import annotations

import argparse
import json

from bnfast.config import show_config


def main(arguments: list[str] | None = None) -> None:
    """Print the report of `bnfast.show_config`."""
    parser = argparse.ArgumentParser(
        prog="python -m bnfast",
        description="Report the backends of bnfast, the one in use, threads and versions.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    if parser.parse_args(arguments).json:
        print(json.dumps(show_config(mode="dict"), indent=2))
    else:
        show_config()


if __name__ == "__main__":
    main()
