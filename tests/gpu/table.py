"""The table that the GPU suite prints, and the file that holds it after every line."""

import json
import threading
import time
from pathlib import Path
from typing import Any

_WORDS = {True: "ok", None: "skipped", False: "no"}


class Table:
    """Lines of a suite; `path` is the JSON file, `more` what it says beside them."""

    def __init__(self, path: Path, **more: Any) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path, self._more, self._began = path, more, time.monotonic()
        self._writing = threading.Lock()

    def note(self, section: str, name: str, holds: bool | None, why: str, **more: Any) -> None:
        """Keep and print a line. holds: None where it was left out; counts=False: only told."""
        row = {"section": section, "name": name, "holds": holds, "why": why, **more}
        verdict = "FAILED" if holds is False and more.get("counts", True) else _WORDS[holds]
        with self._writing:
            self.rows.append(row)
            print(f"{section:7} {verdict:7} {name:24} {more.get('seconds', 0.0):6.1f} s  {why}",
                  flush=True)  # fmt: skip
            self._write()

    def failed(self) -> list[str]:
        """Names of the lines that do not hold."""
        return [r["name"] for r in self.rows if r["holds"] is False and r.get("counts", True)]

    def last_line(self) -> str:
        """What there was, in one line."""
        skipped = sum(row["holds"] is None for row in self.rows)
        return (f"{len(self.rows)} lines in {time.monotonic() - self._began:.0f} s, {skipped} "
                f"skipped, failed: {self.failed() or 'none'}")  # fmt: skip

    def _write(self) -> None:
        """A new file in the place of the old one: a suite that is cut off leaves a whole one."""
        bad = self.failed()
        content = {"seconds": time.monotonic() - self._began, "all_hold": not bad, **self._more,
                   "rows": self.rows}  # fmt: skip
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(content, indent=1, default=str))
        new.replace(self._path)
