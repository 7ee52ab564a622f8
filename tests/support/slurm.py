"""A stand-in for SLURM: sbatch starts the jobs of an array at once, as processes here."""

import os
import stat
import sys
from pathlib import Path

import pytest

SBATCH = """
import os, re, subprocess, sys
home, script = os.environ["STAND_IN"], sys.argv[1]
text = open(script).read()
number = str(100 + len(os.listdir(home)))
open(os.path.join(home, number + ".sbatch"), "w").write(text)
found = re.search(r"--array=0-(\\d+)", text)
for task in range(int(found[1]) + 1) if found and "HELD" not in os.environ else ():
    env = {"SLURM_JOB_ID": f"{number}{task}", "SLURM_ARRAY_JOB_ID": number,
           "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
    with open(os.path.join(home, "log"), "a") as log:
        subprocess.Popen(["bash", script], env={**os.environ, **env}, stdout=log, stderr=log,
                         start_new_session=True)
print("Submitted batch job", number)
"""
SRUN = """
import os, sys
words = sys.argv[1:]
os.execvp(words[words.index("--error") + 2], words[words.index("--error") + 2:])
"""
SACCT = """
import os, sys
print("JobID|State|NodeList")
for number in (word for before, word in zip(sys.argv, sys.argv[1:]) if before == "-j"):
    for task in range(4):
        print(f"{number}_{task}|{os.environ.get('STATE', 'RUNNING')}|here")
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put sbatch, srun and sacct first on the PATH; return where submitted scripts are kept."""
    commands, home = folder / "bin", folder / "slurm-home"
    commands.mkdir()
    home.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (commands / name).write_text(f"#!{sys.executable}\n{text}")
        (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(home))
    return home
