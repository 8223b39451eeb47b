"""What the end-to-end tests share: a small corpus and configuration, jobs with or without
launch/mpirun.sh, and readers of what a run leaves behind.

A test script calls e2e.main(), which takes the binary's path from the command line and runs the
unittest cases of the script. Only the standard library is used.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import uuid

SOURCE = pathlib.Path(__file__).resolve().parents[2]
MPIRUN = SOURCE / "launch" / "mpirun.sh"

# Every process of a job carries this variable, so that a scan of /proc finds them all, whatever
# became of their parents.
MARK = "LONGSPAN_TEST_JOB"

OPTIONS = argparse.Namespace(longspan=None, compare=None)  # set by main()

# Seconds that processes may outlive the error that ends their job.
GONE_WITHIN = 10
# No single job of these tests takes longer, even on a busy machine.
JOB_LIMIT = 600

CONFIG = """\
run {
  seed: 7
  steps: 6
  context_length: 512
  global_batch_tokens: 2048
  precision: F32
}
model {
  vocab_size: 320
  hidden_size: 32
  num_layers: 2
  num_heads: 4
  num_kv_heads: 2
  head_dim: 8
  ffn_hidden_size: 64
  mixer { name: "dense" softmax { causal {} } }
  mixer { name: "s2" softmax { s2 { block_size: 64 local_blocks: 1 stride_blocks: 2 } } }
  layers: "dense s2"
}
data {
  train { path: "corpus/train" }
  validation { path: "corpus/validation" }
}
parallel { dp: 1 cp: 2 placement: ZIGZAG strategy: RING }
optimizer { adamw { lr: 1e-2 } clip_norm: 1.0 }
schedule { constant {} }
checkpoint { every_steps: 2 keep_last: 3 }
evaluation { every_steps: 3 rows: 5 }
"""


def main(parser=None):
    """Parses the arguments that all scripts take and runs the script's unittest cases."""
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--longspan", required=True, type=pathlib.Path, help="the binary")
    parser.add_argument("--compare", type=pathlib.Path, help="the tool compare_checkpoints")
    _, rest = parser.parse_known_args(namespace=OPTIONS)
    OPTIONS.longspan = OPTIONS.longspan.resolve()
    unittest.main(module="__main__", argv=[sys.argv[0], *rest], verbosity=2)


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str
    seconds: float
    seconds_after_error: float  # from the error's appearance to the end of the last process

    def describe(self):
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


@dataclasses.dataclass(frozen=True)
class Process:
    pid: int
    kind: str  # "rank", "mpirun" or "other"
    rank: int  # of a rank, else -1


def _restore_signals():
    # A shell that starts the tests in the background leaves INT ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def _environment(extra):
    inherited = {k: v for k, v in os.environ.items()
                 if not k.startswith(("OMPI_", "PMIX_", "PMI_", "SLURM_", MARK))}
    return {**inherited, "OMP_NUM_THREADS": "1", **(extra or {})}


class Job:
    """`longspan ARGS`, plainly (ranks = 0) or as `ranks` ranks under launch/mpirun.sh."""

    def __init__(self, folder, args, ranks=0, quiet=True, env=None):
        self.mark = uuid.uuid4().hex
        command = [str(OPTIONS.longspan), *map(str, args)]
        if ranks > 0:
            command = [str(MPIRUN), "-n", str(ranks), *(["--quiet"] if quiet else []), *command]
        # Files, not pipes: a killed job's leftovers could hold a pipe open.
        self.out_path = pathlib.Path(folder) / f"out.{self.mark}"
        self.err_path = pathlib.Path(folder) / f"err.{self.mark}"
        self.start = time.monotonic()
        with open(self.out_path, "wb") as out, open(self.err_path, "wb") as err:
            self.process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                env={**_environment(env), MARK: self.mark}, preexec_fn=_restore_signals)

    def processes(self):
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                variables = pathlib.Path("/proc", entry, "environ").read_bytes().split(b"\0")
                program = os.readlink(f"/proc/{entry}/exe")
                name = pathlib.Path("/proc", entry, "comm").read_text().strip()
            except OSError:  # it ended meanwhile, or is a zombie
                continue
            if wanted not in variables:
                continue
            if program == str(OPTIONS.longspan):
                ranks = [v for v in variables if v.startswith(b"OMPI_COMM_WORLD_RANK=")]
                found.append(Process(int(entry), "rank", int(ranks[0].split(b"=")[1]) if ranks else 0))
            else:
                found.append(Process(int(entry), "mpirun" if name == "mpirun" else "other", -1))
        return found

    def running(self):
        return self.process.poll() is None

    def wait(self, limit=JOB_LIMIT):
        """Waits for every process of the job to end."""
        deadline = time.monotonic() + limit
        error_seen = None
        while self.running() or self.processes():
            now = time.monotonic()
            if error_seen is None and b"longspan: error" in self.err_path.read_bytes():
                error_seen = now
            if now > deadline:
                left = self.processes()
                self.kill()
                raise AssertionError(f"the job did not end within {limit} s; left: {left}\n"
                                     + self.result(0).describe())
            time.sleep(0.02)
        end = time.monotonic()
        return self.result(end - error_seen if error_seen is not None else 0)

    def result(self, seconds_after_error):
        return Result(self.process.poll() if self.process.poll() is not None else -1,
                      self.out_path.read_text(errors="replace"),
                      self.err_path.read_text(errors="replace"),
                      time.monotonic() - self.start, seconds_after_error)

    def kill(self):
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        self.process.wait()


def wait_until(condition, what, limit=120):
    """Polls `condition` and returns its first true value."""
    deadline = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {limit} s for {what}")
        time.sleep(0.005)


def random_text(rng, words, sentences):
    return " ".join(
        " ".join(rng.choice(words) for _ in range(rng.randint(4, 12))).capitalize() + "."
        for _ in range(sentences))


def write_corpus(folder):
    """corpus.jsonl: 300 documents of 100 to 2000 bytes over a small vocabulary, always the same."""
    rng = random.Random(5)
    words = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 7)))
             for _ in range(60)]
    path = pathlib.Path(folder) / "corpus.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(300):
            file.write(json.dumps({"text": random_text(rng, words, rng.randint(2, 40))}) + "\n")
    return path


class Metrics:
    """metrics.jsonl. Every step from 1 on must occur once and in order, evaluations after their
    step."""

    KEYS = ["step", "loss", "grad_norm", "lr", "tokens", "valid_tokens", "step_ms", "tokens_per_s",
            "mfu", "work_max_over_mean", "comm_bytes", "control_bytes", "strategies", "plan_ms",
            "context_work_max_over_mean", "peak_rss_bytes", "peak_device_bytes", "peak_device_memory"]
    MEMORY = ["activations", "parameters", "gradients", "optimizer", "workspace", "staging",
              "attention", "communication"]

    def __init__(self, run):
        self.steps, self.evaluations = [], {}
        for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if "eval" in entry:
                key = (entry["step"], entry["eval"])
                assert key not in self.evaluations, f"evaluated twice: {line}"
                assert self.steps and entry["step"] == self.steps[-1]["step"], f"out of order: {line}"
                self.evaluations[key] = entry["value"]
                continue
            gates = [key for key in ("objective", "mean_gate") if key in entry]
            assert list(entry) == self.KEYS + gates, f"keys of {line}"
            assert list(entry["peak_device_memory"]) == self.MEMORY, f"categories of {line}"
            assert sum(entry["peak_device_memory"].values()) == entry["peak_device_bytes"], line
            assert entry["step"] == len(self.steps) + 1, f"step out of order: {line}"
            self.steps.append(entry)

    def losses(self):
        return [entry["loss"] for entry in self.steps]

    def curves(self):
        """What must be the same bits in every repetition of a run."""
        keys = ("step", "loss", "grad_norm", "lr", "tokens", "valid_tokens")
        return [tuple(entry[k] for k in keys) for entry in self.steps], self.evaluations


def last_logged_step(run):
    """The last complete step line, 0 when there is none; the run may be writing."""
    try:
        lines = (pathlib.Path(run) / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return 0
    steps = [json.loads(line)["step"] for line in lines]
    return max(steps, default=0)


def relative_difference(values, expected):
    assert len(values) == len(expected), f"{len(values)} values instead of {len(expected)}"
    return max(abs(v - e) / abs(e) for v, e in zip(values, expected))


def digest(folder):
    """Every file and folder below `folder` with a hash of its content. The lock file is left out: it
    names its last holder."""
    found = {}
    for path in sorted(pathlib.Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "directory"
        elif name != "lock":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def checkpoints(run):
    """Names in checkpoints/ that a run may be continued from, oldest first."""
    folder = pathlib.Path(run) / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name[5:].isdigit())


class TestCase(unittest.TestCase):
    """A test with a folder of its own that holds corpus/ and config.textproto."""

    @classmethod
    def setUpClass(cls):
        cls.shared = pathlib.Path(tempfile.mkdtemp(prefix="longspan_e2e_"))
        cls.addClassCleanup(shutil.rmtree, cls.shared, ignore_errors=True)
        job = Job(cls.shared, ["prepare", write_corpus(cls.shared), "--tokenizer", "byte", "--out",
                               "corpus", "--validation-fraction", "0.1", "--json"])
        result = job.wait()
        assert result.code == 0, result.describe()
        cls.prepared = json.loads(result.out)

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=self.shared))
        (self.folder / "corpus").symlink_to(self.shared / "corpus")
        self.config = self.write("config.textproto", CONFIG)

    def write(self, name, text):
        path = self.folder / name
        path.write_text(text)
        return path

    def start(self, args, ranks=0, **kwargs):
        job = Job(self.folder, args, ranks, **kwargs)
        self.addCleanup(job.kill)
        return job

    def train_arguments(self, run, sets=(), extra=(), config=None):
        args = ["train", config or self.config, "--run-dir", run, *extra]
        for value in sets:
            args += ["--set", value]
        return args

    def run_ok(self, args, ranks=0, **kwargs):
        result = self.start(args, ranks, **kwargs).wait()
        self.assertEqual(result.code, 0, result.describe())
        return result

    def train(self, run, ranks=2, sets=(), extra=(), **kwargs):
        """Trains to the end. Without ranks, or with one, parallel.cp is set to 1."""
        layout = [] if ranks == 2 else ["parallel.cp=1"]
        return self.run_ok(self.train_arguments(run, [*layout, *sets], extra), ranks, **kwargs)

    def compare(self, expected, actual, prefix=""):
        """Differences of two checkpoints per tensor, see compare_checkpoints.cpp."""
        done = subprocess.run([OPTIONS.compare, expected, actual, prefix], capture_output=True,
                              text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        tensors = json.loads(done.stdout)["tensors"]
        self.assertGreater(len(tensors), 0)
        return tensors
