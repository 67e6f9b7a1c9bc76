#!/usr/bin/env bash
# Twenty times: start `run_all.sh smoke`, and kill all of it after a random time. Then let it end, and compare its report
# with that of an undisturbed run: every number has to be the same, and nothing half-written may be left. A quarter of an
# hour on two CPU cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT
export JAX_COMPILATION_CACHE_DIR=$OUT/compiled
RANDOM=1
bash run_all.sh smoke --out "$OUT/undisturbed" > "$OUT/undisturbed.log" 2>&1 || { tail -n 20 "$OUT/undisturbed.log"; exit 1; }
for number in $(seq 20); do
  setsid bash run_all.sh smoke --out "$OUT/killed" > "$OUT/killed.log" 2>&1 &
  sleep $((2 + RANDOM % 30))
  kill -KILL -- -$! 2>/dev/null || true
  wait $! 2>/dev/null || true
  echo "killed $number: $(grep '^== ' "$OUT/killed.log" | tail -n 1)"
done
bash run_all.sh smoke --out "$OUT/killed" > "$OUT/killed.log" 2>&1 || { tail -n 20 "$OUT/killed.log"; exit 1; }
"${PYTHON:-python3}" - "$OUT" <<'END'
import json, sys
from pathlib import Path

def plain(found):
    """Without what is a time, and checksums of models, whose headers say how long the choice took."""
    if isinstance(found, dict):
        return {name: plain(value) for name, value in found.items() if "seconds" not in name and name != "weights"}
    return [plain(value) for value in found] if isinstance(found, list) else found


def read(name):
    """The report, without the folder that it is in; as text, in which what is not a number is equal to itself."""
    folder = Path(sys.argv[1]) / name
    report = plain(json.loads((folder / "smoke" / "report.json").read_text().replace(str(folder), "")))
    return {section: json.dumps(content) for section, content in report.items()}


one, other = read("undisturbed"), read("killed")
different = [section for section in one if one[section] != other[section]]
left = [str(path) for path in Path(sys.argv[1]).rglob(".*.partial.*")]
print("different:", different or "nothing", "- half-written files:", left or "none")
sys.exit(bool(different or left))
END
