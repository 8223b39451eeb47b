"""TensorBoard reads a run's event files and sees the curves of metrics.jsonl.

Needs a Python on PATH that can import `tensorboard` (Debian has no package: pip install tensorboard
in a virtual environment). Without one it says so, and fails only with --require.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import e2e

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--require", action="store_true", help="fail when TensorBoard is missing")
ARGUMENTS = argparse.Namespace()

# Runs under the Python that has TensorBoard: {tag: [[step, value], ...]} of a run directory.
READ_EVENTS = """
import json, sys
from tensorboard.backend.event_processing import event_accumulator
events = event_accumulator.EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
print(json.dumps({tag: [[e.step, e.value] for e in events.Scalars(tag)]
                  for tag in events.Tags()["scalars"]}))
"""


def python_with_tensorboard():
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        python = pathlib.Path(folder) / "python3"
        if os.access(python, os.X_OK) and subprocess.run(
                [python, "-c", "import tensorboard"], capture_output=True, check=False
        ).returncode == 0:
            return python
    return None


class TensorBoardTest(e2e.TestCase):
    def curves(self, run):
        done = subprocess.run([self.python, "-c", READ_EVENTS, run], capture_output=True, text=True,
                              check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    def test_curves(self):
        self.python = python_with_tensorboard()
        if self.python is None:
            print("peer not run: TensorBoard is not installed")
            self.assertFalse(ARGUMENTS.require, "TensorBoard is not installed")
            return
        run = self.folder / "run"
        self.train(run, sets=["run.steps=4"])
        # A second event file: resumed at step 2, so that steps 3 and 4 are there twice.
        self.train(run, sets=["run.steps=6"], extra=["--resume", "2"])
        self.assertEqual(len(list(run.glob("events.out.tfevents.*"))), 2)
        metrics, seen = e2e.Metrics(run), self.curves(run)
        for name in ("loss", "grad_norm", "lr", "tokens_per_s", "step_ms", "mfu", "comm_bytes",
                     "peak_rss_bytes"):
            points = seen[f"train/{name}"]
            self.assertEqual([step for step, _ in points], list(range(1, 7)), name)
            for (_, value), entry in zip(points, metrics.steps):
                # TensorBoard keeps single precision.
                self.assertLessEqual(abs(value - entry[name]), 1e-6 * abs(entry[name]), name)
        self.assertEqual([step for step, _ in seen["eval/validation_loss"]],
                         [step for step, _ in metrics.evaluations])
        for (_, value), expected in zip(seen["eval/validation_loss"], metrics.evaluations.values()):
            self.assertLessEqual(abs(value - expected), 1e-6 * expected)
        version = subprocess.run([self.python, "-c", "import tensorboard as t; print(t.__version__)"],
                                 capture_output=True, text=True, check=True).stdout.strip()
        print(f"TensorBoard {version} at {self.python}: {len(seen)} curves of 6 steps agree with "
              "metrics.jsonl", file=sys.stderr)


if __name__ == "__main__":
    PARSER.parse_known_args(namespace=ARGUMENTS)
    e2e.main(PARSER)
