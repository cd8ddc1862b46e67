"""Write the golden files anew: ``make golden``. Read the diff before it is committed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golden_graphs import FOLDER, golden_files


def main() -> None:
    """Write every file, drop those that are no longer made, and name what changed."""
    files = golden_files()
    for file in sorted(FOLDER.glob("*.txt")):
        if file.name not in files:
            file.unlink()
            print(f"dropped {file.name}")
    for name, text in files.items():
        file = FOLDER / name
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            print(f"wrote {name}")


if __name__ == "__main__":
    main()
