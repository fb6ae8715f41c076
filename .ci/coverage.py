"""Print how many lines of every file the tests have run, and fail below a floor: ``coverage.py FILE PERCENT``."""

import json
import sys
from pathlib import Path

found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
for name, file in sorted(found["files"].items()):
    if file["missing_lines"]:
        print(f"{name:60} {file['summary']['percent_covered']:5.1f} %  not run: {len(file['missing_lines'])} lines")
percent = found["summary"]["percent_covered"]
print(f"{percent:.1f} % of {sum(found['summary'][kind] for kind in ('covered_lines', 'missing_lines'))} lines")
if percent < float(sys.argv[2]):
    sys.exit(f"less than {sys.argv[2]} %")
