"""Name tables whose entries are imported on first use.

A table is written out in one place, `{"gptq": "vlmq.solvers.gptq:solve"}`, so that a reader sees every entry,
an unknown name can list the known ones, and nothing heavy is imported before it is asked for.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any


class Registry(Mapping[str, Any]):
    """A read-only mapping from a name to the object that "module:attribute" points to."""

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        """Import and return the entry.

        Raises:
            ValueError: the name is unknown; the message lists the known names.
        """
        if name not in self._entries:
            raise ValueError(f"{self.kind} {name!r} is unknown; known: {' '.join(self._entries)}")
        module, attribute = self._entries[name].split(":")
        return getattr(import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
