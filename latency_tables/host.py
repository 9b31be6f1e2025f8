"""The machine and the condition that measurements belong to."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Host:
    """The machine and the condition that rows belong to.

    `hostname` and `governor` are recorded; rows of hosts that differ in any other field are never
    mixed.
    """

    device: str
    runtime: str
    runtime_version: str
    cpu: str
    flags: str
    threads: int = 1
    batch: int = 1
    governor: str = ""
    hostname: str = ""

    def difference(self, other: "Host") -> str:
        """The first field that makes two hosts differ, with both values; empty if none does."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name not in ("hostname", "governor") and mine != theirs:
                return f"{item.name}: {_short(mine)} against {_short(theirs)}"
        return ""

    @property
    def file_name(self) -> str:
        """The table's file: one a condition."""
        return f"{self.device}-{self.runtime}-t{self.threads}-b{self.batch}.parquet"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
