"""The threads under the decoder, with the thread sanitizer watching."""

import subprocess
from pathlib import Path

from quantkit.kernels import build


def test_threads_never_race(tmp_path):
    driver = tmp_path / "team"
    csrc = build.sources()[0].parent
    command = [*build.compiler(), "-std=c++17", "-O1", "-g1", "-pthread", "-fsanitize=thread", f"-I{csrc}"]
    command += [str(csrc / "team.cpp"), str(Path(__file__).with_name("team.cpp")), "-o", str(driver)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run([driver], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "all right"), done.stderr[-3000:]
