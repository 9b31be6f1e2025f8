"""The tables that come with the package: of machines that may not be yours.

They lie in a folder for each machine, beside a README that tells how they were made. Nothing uses
them by itself: a table is looked for where yours are kept, and is refused on another host.
"""

from pathlib import Path


def shipped() -> list[Path]:
    """The files of the tables that come with the package."""
    return sorted(Path(__file__).parent.glob("*/*.parquet"))
