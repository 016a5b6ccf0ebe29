"""``python -m monai_conres.bundle runs/fold*/evaluation/cases.csv --out FOLDER``: join the tables of several runs."""

from __future__ import annotations

import argparse

from monai_conres.bundle.report import join_reports


def main() -> None:
    """Join the tables, such as those of the folds of a cross-validation, and print their means."""
    parser = argparse.ArgumentParser(prog="python -m monai_conres.bundle", description="Join tables of cases.")
    parser.add_argument("tables", nargs="+", help="cases.csv of each run")
    parser.add_argument("--out", required=True, help="folder for the table of all cases and its summary")
    arguments = parser.parse_args()
    try:
        print(join_reports(arguments.tables, arguments.out))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
