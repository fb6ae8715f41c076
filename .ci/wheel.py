"""Build the wheel, and see that it is pure Python and that every file of the package is in it; run by .ci/run."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

FOLDER = Path("build/wheel")


def main() -> None:
    """Build and compare with what git knows."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(FOLDER), "."], check=True)
    (wheel,) = FOLDER.glob("quantkit-*-py3-none-any.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "quantkit", "kernels_cuda"], capture_output=True, text=True, check=True)
    wanted = {name.replace("kernels_cuda/", "quantkit/kernels/kernels_cuda/") for name in tracked.stdout.splitlines()}
    if missing := sorted(wanted - inside):
        sys.exit(f"not in the wheel: {missing}")
    print(f"{wheel.name}: {len(inside)} files, {wheel.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
