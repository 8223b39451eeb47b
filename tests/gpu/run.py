"""Tests and measures Longspan on a GPU.

usage: tests/gpu/run.sh [smoke|tests|sanitize|bench|peers|step]... [--budget SECONDS]

  smoke      one case per kernel (2 minutes at most)
  tests      all tests of longspan_gpu_tests
  sanitize   compute-sanitizer: memcheck and racecheck on the smoke cases
  bench      kernels and a training step against what the device can do
  peers      attention against PyTorch, in alternating rounds
  step       the quickstart on CPU and GPU from one seed; 4 ranks as threads; 2 processes with NCCL

Without a part: all of them in this order in 8 minutes together. A part named alone has 8 minutes for
itself. Results go, as they come, to at most 6 files in $OUT or ./gpu-results: table.txt, results.jsonl,
log.txt, bench.jsonl, peers.jsonl, step.jsonl. Exit status 0: nothing failed or was cut short.

Runs from a build of preset cuda or from an unpacked bundle (launch/bundle.sh). LONGSPAN and
LONGSPAN_GPU_TESTS name other programs than the ones found there.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import report  # noqa: E402
from report import FAILED, GOOD, INCOMPLETE, NO_GPU, NOT_RUN, PARTIAL, PASSED, UNAVAILABLE  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FILES = ("table.txt", "results.jsonl", "log.txt", "bench.jsonl", "peers.jsonl", "step.jsonl")
ALONE_S, SMOKE_S = 480, 120
# Of the 8 minutes of all parts together; what one leaves over goes to the next.
SHARES_S = {"smoke": 60, "tests": 130, "sanitize": 60, "bench": 90, "peers": 60, "step": 70}
SHARDS = 4  # processes of the part `tests`, which share the GPU
CONTRACT_S = 90  # for tests in which two processes may wait for each other in vain
STEPS = 50
TOLERANCE = {"F32": 1e-4, "BF16": 1e-2}


class Run:
    """One invocation: where results go, which programs, and how much time is left."""

    def __init__(self, out):
        self.out = out
        os.makedirs(out, exist_ok=True)
        for name in FILES:
            open(os.path.join(out, name), "w", encoding="utf-8").close()
        self.log = open(os.path.join(out, "log.txt"), "a", encoding="utf-8")
        self.lock = threading.Lock()
        self.children = []
        self.good, self.passed = True, 0
        self.deadline = 0.0
        self.part = ""
        self.longspan = program("LONGSPAN", "longspan")
        self.tests = program("LONGSPAN_GPU_TESTS", "longspan_gpu_tests")
        self.facts = {}

    def left(self):
        return max(0.0, self.deadline - time.monotonic())

    def say(self, text):
        with self.lock:
            self.log.write(text + "\n")
            self.log.flush()

    def append(self, name, record):
        with open(os.path.join(self.out, name), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def record(self, check, result, detail, start):
        seconds = time.monotonic() - start
        self.append("results.jsonl", {"part": self.part, "check": check, "result": result,
                                      "seconds": seconds, "detail": detail})
        self.good &= result in GOOD
        self.passed += result in (PASSED, PARTIAL)
        print(f"{self.part:9} {check:24} {result:18} {seconds:5.0f} s  {detail}", flush=True)
        self.write_table()

    def write_table(self):
        text = report.table(self.out, self.facts)
        path = os.path.join(self.out, "table.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return text

    def start(self, argv, environment=None, keep=None):
        """A child whose lines go to the log, and to the list and function that come back and in."""
        self.say(f"$ {' '.join(argv)}")
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                 errors="replace", start_new_session=True, cwd=ROOT,
                                 env={**os.environ, **(environment or {})})
        lines = []

        def read():
            for line in child.stdout:
                lines.append(line.rstrip("\n"))
                self.say(lines[-1])
                if keep:
                    keep(lines[-1])

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        self.children.append(child)
        return child, lines, thread

    def finish(self, started, at_most=float("inf")):
        """(lines, status, timed out) of each child; they end with the part's time, or after `at_most`
        seconds."""
        results, end = [], time.monotonic() + at_most
        for child, lines, thread in started:
            timed_out = False
            try:
                child.wait(timeout=max(0.0, min(self.left(), end - time.monotonic())))
            except subprocess.TimeoutExpired:
                timed_out = True
                stop(child)
            thread.join(timeout=5)
            self.children.remove(child)
            results.append((lines, child.returncode, timed_out))
        return results

    def run(self, argv, environment=None, keep=None):
        return self.finish([self.start(argv, environment, keep)])[0]

    def stop_all(self):
        for child in list(self.children):
            stop(child)


def stop(child):
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def program(variable, name):
    """Of a bundle, of a build, or as the environment says."""
    if os.environ.get(variable):
        return os.path.abspath(os.environ[variable])
    for folder in ("bin", "build/cuda", "build/bundle"):
        path = os.path.join(ROOT, folder, name)
        if os.access(path, os.X_OK):
            return path
    return None


def first_line(argv):
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def facts():
    gpu = first_line(["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm",
                      "--format=csv,noheader"])
    try:
        with open(os.path.join(ROOT, "BUNDLE"), encoding="utf-8") as file:
            commit = file.readline().split()[-1]
    except FileNotFoundError:
        commit = first_line(["git", "describe", "--always", "--dirty", "--abbrev=12"]) or "unknown"
    return {"device": gpu or "unknown (no nvidia-smi)", "commit": commit,
            "command": "tests/gpu/run.sh " + " ".join(sys.argv[1:])}


def what_is_missing(run):
    """None, or (result, reason) of every part."""
    if run.longspan is None or run.tests is None:
        return FAILED, "no longspan or no longspan_gpu_tests: build preset cuda or unpack a bundle"
    done = subprocess.run([run.tests, "--device=cuda", "--gtest_list_tests"], capture_output=True,
                          text=True, check=False, cwd=ROOT)
    if done.returncode == 0:
        return None
    message = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()
    return NO_GPU, message[-1]


def smoke_filter():
    with open(os.path.join(ROOT, "tests", "gpu", "smoke.txt"), encoding="utf-8") as file:
        return ":".join(p for line in file if (p := line.split("#")[0].strip()))


def test_command(run, *options):
    return [run.tests, "--device=cuda", "--gtest_color=no", *options]


# --- The parts.


def smoke(run):
    start = time.monotonic()
    result = report.judge_gtest(*run.run(test_command(run, f"--gtest_filter={smoke_filter()}")))
    run.record("one case per kernel", *result, start)


def tests(run):
    start = time.monotonic()
    shards = max(1, min(SHARDS, (os.cpu_count() or 1) // 2))
    started = [run.start(test_command(run, "--gtest_filter=-*Exhaustive*"),
                         {"GTEST_TOTAL_SHARDS": str(shards), "GTEST_SHARD_INDEX": str(i)})
               for i in range(shards)]
    ended = run.finish(started)
    lines = [line for shard, _, _ in ended for line in shard]
    status = next((status for _, status, _ in ended if status), 0)
    run.record("all tests", *report.judge_gtest(lines, status, any(late for _, _, late in ended)), start)


def sanitize(run):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin:/opt/cuda/bin")
    for tool in ("memcheck", "racecheck"):
        start = time.monotonic()
        if sanitizer is None:
            run.record(tool, UNAVAILABLE, "compute-sanitizer is not installed", start)
            continue
        command = test_command(run, f"--gtest_filter={smoke_filter()}")
        lines, status, timed_out = run.run(
            [sanitizer, "--tool", tool, "--target-processes", "all", "--error-exitcode", "86", *command])
        run.record(tool, *report.judge_sanitizer(lines, status, timed_out), start)


def bench(run):
    """The built-in lists of the program for a GPU; the machine's own peaks first."""
    help_text = "\n".join(run.run([run.longspan, "bench", "--help"])[0])
    for op in ("machine", "memory", "attention", "step", "gemm"):
        start = time.monotonic()
        if op not in help_text or "--device" not in help_text:
            run.record(op, NOT_RUN, "this program cannot measure it", start)
            continue
        count = [0]

        def keep(line, count=count):
            try:
                record = json.loads(line)
                run.append("bench.jsonl", record)
                count[0] += record["op"] == op
            except ValueError:
                pass

        ended = run.run([run.longspan, "bench", op, "--device", "cuda", "--json", "--seconds", "0.2"],
                        keep=keep)
        run.record(op, *judge_measurements(count[0], *ended), start)


def judge_measurements(count, lines, status, timed_out):
    if timed_out:
        return (PARTIAL if count else INCOMPLETE), f"{count} records before the time was up"
    if status != 0 or count == 0:
        return FAILED, f"{count} records, status {status}: {lines[-1] if lines else 'no output'}"
    return PASSED, f"{count} records"


def peers(run):
    start = time.monotonic()
    lines, status, timed_out = run.run(
        [sys.executable, os.path.join(ROOT, "tests", "bench", "compare.py"), "--device", "cuda", "--longspan",
         run.longspan, "--out", os.path.join(run.out, "peers.jsonl"), "--budget", str(max(1.0, run.left() - 5))])
    detail = next((line for line in reversed(lines) if line), "no output")
    absent = next((line for line in lines if line.startswith("peer not run")), None)
    records = [r for r in report.read_jsonl(os.path.join(run.out, "peers.jsonl"))
               if r.get("op") == "attention"]
    if absent:
        run.record("attention", UNAVAILABLE if "not installed" in absent else FAILED, absent, start)
    elif status == 0:
        run.record("attention", PASSED, f"{len(records)} records", start)
    elif timed_out or status == 3:
        run.record("attention", PARTIAL if records else INCOMPLETE, detail, start)
    else:
        run.record("attention", FAILED, detail, start)


class Quickstart:
    """Runs of the quickstart's model on its corpus, 50 steps each."""

    TEXT = ("ops parallel data configs trainer launch tests docs README.md CONTRIBUTING.md "
            "CMakeLists.txt").split()

    def __init__(self, run, folder):
        self.run, self.folder = run, folder
        self.problems = {}  # of the runs that were made

    def prepare(self):
        """None, or what went wrong."""
        lines, status, timed_out = self.run.run(
            [self.run.longspan, "prepare", *self.TEXT, "--tokenizer", "byte", "--out",
             os.path.join(self.folder, "corpus"), "--validation-fraction", "0.05"])
        return f"prepare: status {status}: {lines[-1] if lines else ''}" if status or timed_out else None

    def command(self, name, device, precision, *options):
        corpus = os.path.join(self.folder, "corpus")
        return [self.run.longspan, "train", "configs/quickstart.textproto",
                "--run-dir", os.path.join(self.folder, name),
                "--set", f"data.train[0].path={corpus}/train",
                "--set", f"data.validation[0].path={corpus}/validation",
                "--set", f"run.device={device}", "--set", f"run.precision={precision}",
                "--set", f"run.steps={STEPS}", "--set", "evaluation.every_steps=1000",
                "--set", "checkpoint.every_steps=1000", *options]

    def problem(self, name, lines, status, timed_out):
        """None, or (result, detail) of a run that did not end well."""
        if timed_out:
            return INCOMPLETE, f"the time was up during the run {name}"
        if status != 0:
            return FAILED, f"{name}: status {status}: {lines[-1] if lines else 'no output'}"
        return None

    def train(self, name, device, precision, *options):
        """(its losses, problem); each run is made once."""
        if name not in self.problems:
            ended = self.run.run(self.command(name, device, precision, *options))
            self.problems[name] = self.problem(name, *ended)
        return report.losses(os.path.join(self.folder, name)), self.problems[name]


def compare_runs(run, check, ours, reference, tolerance):
    """`ours` and `reference` are what Quickstart.train gives."""
    for _, problem in (ours, reference):
        if problem:
            return problem
    result, detail, points = report.judge_curves(ours[0], reference[0], tolerance, STEPS)
    for point in points:
        run.append("step.jsonl", {"check": check, **point})
    return result, detail


ONE_RANK = ("--set", "parallel.cp=1")


def step(run):
    with tempfile.TemporaryDirectory() as folder:
        quickstart = Quickstart(run, folder)
        start = time.monotonic()
        if problem := quickstart.prepare():
            run.record("corpus", FAILED, problem, start)
            return
        for precision, tolerance in TOLERANCE.items():
            start, check = time.monotonic(), f"CPU and CUDA, {precision}"
            ours = quickstart.train(f"cuda_{precision}", "CUDA", precision, *ONE_RANK)
            reference = quickstart.train(f"cpu_{precision}", "CPU", precision, *ONE_RANK)
            run.record(check, *compare_runs(run, check, ours, reference, tolerance), start)
        threads_as_ranks(run, quickstart)
        nccl_processes(run, quickstart)


def threads_as_ranks(run, quickstart):
    help_text = "\n".join(run.run([run.longspan, "train", "--help"])[0])
    for strategy in ("RING", "ALL_GATHER", "ULYSSES", "HYBRID", "EXCHANGE", "AUTO"):
        start, check = time.monotonic(), f"4 ranks, {strategy}"
        if "--local-ranks" not in help_text:
            run.record(check, NOT_RUN, "this program has no train --local-ranks", start)
            continue
        ours = quickstart.train(f"ranks_{strategy}", "CUDA", "F32", "--local-ranks", "4",
                                "--set", "parallel.cp=4", "--set", f"parallel.strategy={strategy}")
        reference = quickstart.train("cuda_F32", "CUDA", "F32", *ONE_RANK)
        run.record(check, *compare_runs(run, check, ours, reference, TOLERANCE["F32"]), start)


def nccl_processes(run, quickstart):
    """Two processes on one GPU: NCCL takes them for two machines and sends over loopback sockets."""
    def environment(rank, job):
        return {"LONGSPAN_RANK": str(rank), "LONGSPAN_WORLD_SIZE": "2", "LONGSPAN_LOCAL_RANK": "0",
                "LONGSPAN_RENDEZVOUS": os.path.join(quickstart.folder, job),
                "LONGSPAN_JOB_ID": f"{job}-{os.getpid()}", "NCCL_HOSTID": f"rank{rank}",
                "NCCL_SOCKET_IFNAME": "lo", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1",
                "NCCL_IB_DISABLE": "1"}

    start = time.monotonic()
    started = [run.start(test_command(run, "--gtest_filter=*NcclProcess*"), environment(rank, "contract"))
               for rank in range(2)]
    verdicts = [report.judge_gtest(*ended) for ended in run.finish(started, CONTRACT_S)]
    run.record("2 processes, NCCL", *next((v for v in verdicts if v[0] != PASSED), verdicts[0]), start)

    start, check = time.monotonic(), "2 processes, training"
    started = [run.start(quickstart.command("processes", "CUDA", "F32", "--set", "parallel.cp=2",
                                             "--set", "parallel.backend=NCCL"),
                         environment(rank, "training")) for rank in range(2)]
    ended = run.finish(started)
    problem = next((p for lines, status, late in ended
                    if (p := quickstart.problem("processes", lines, status, late))), None)
    ours = (report.losses(os.path.join(quickstart.folder, "processes")), problem)
    reference = quickstart.train("cuda_F32", "CUDA", "F32", *ONE_RANK)
    run.record(check, *compare_runs(run, check, ours, reference, TOLERANCE["F32"]), start)


PARTS = {"smoke": smoke, "tests": tests, "sanitize": sanitize, "bench": bench, "peers": peers, "step": step}


def run_parts(run, names, budget):
    """Each part in its time: alone, or its share and what earlier ones left."""
    end = time.monotonic() + budget
    together = time.monotonic()
    missing = what_is_missing(run)
    for name in names:
        run.part = name
        start = time.monotonic()
        if len(names) == len(PARTS):
            together += SHARES_S[name] * budget / ALONE_S
            run.deadline = min(end, together)
        else:
            run.deadline = start + (min(SMOKE_S, budget) if name == "smoke" else budget)
        if missing:
            run.record("all", *missing, start)
        else:
            PARTS[name](run)


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("usage: ")[1].split("\n")[0], add_help=False)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--budget", type=float, default=ALONE_S)
    parser.add_argument("-h", "--help", action="store_true")
    arguments = parser.parse_args()
    if arguments.help:
        print(__doc__.strip())
        return 0
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        print(f"run.sh: there is no part {unknown[0]}: use {', '.join(PARTS)}", file=sys.stderr)
        return 2
    run = Run(os.path.abspath(os.environ.get("OUT") or "gpu-results"))
    run.facts = facts()

    def stop_early(number, _):
        run.stop_all()
        print(f"stopped by signal {number}; results so far: {run.out}")
        os._exit(1)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_early)
    names = [name for name in PARTS if name in arguments.parts] if arguments.parts else list(PARTS)
    run_parts(run, names, arguments.budget)
    print("\n" + run.write_table())
    print(f"files: {run.out}")
    return 0 if run.good and run.passed else 1


if __name__ == "__main__":
    sys.exit(main())
