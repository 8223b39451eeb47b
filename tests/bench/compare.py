#!/usr/bin/env python3
"""Longspan and its peers on the same cases, in alternating rounds on one machine.

usage: compare.py [attention|step] --longspan FILE --out FILE [--device cpu|cuda] [--threads N]
                  [--peer COMMAND] [--problem NAME_OR_FILE]... [--set FIELD=VALUE]... [--rounds N]
                  [--repeats N] [--seconds S] [--budget S]

Each round of a case measures `longspan bench OP --json --impl best`, then the peers (a script of
tests/bench/peers: gpu.py, attention_torch.py or step_torch.py; kept running with --serve, so that it
compiles once), with the same threads. Written as JSON lines, as each case ends: the peaks of the machine,
our records with the medians over the rounds and the fastest peer in `peer` and `peer_ms_median`, and those
of each peer. Exit status 0 when every case was measured, 3 when the budget ended first or no peer ran,
1 for errors, also a step whose peer has other parameters or another first loss.
"""

import argparse
import json
import math
import os
import select
import shlex
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "peers"))
from common import read_names  # noqa: E402

PEERS = {("attention", "cuda"): "gpu.py", ("attention", "cpu"): "attention_torch.py",
         ("step", "cpu"): "step_torch.py"}
PROBLEMS = {("attention", "cuda"): "attention_gpu.txt", ("attention", "cpu"): "attention_default.txt",
            ("step", "cpu"): "llama_50m.textproto"}
LOSS_TOLERANCE = 0.05  # of first losses, which differ by initial weights and tokens


class OutOfTime(Exception):
    pass


class Peer:
    """The peers' program, answering one case at a time."""

    def __init__(self, command, deadline):
        self.deadline = deadline
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.buffer = b""
        self.start = []  # what it measured of the machine
        self.why = None  # it does not run
        while self.why is None:
            line = self.read_line()
            if line is None:
                self.why = f"peer not run: {command[0]} ended without a word"
            elif not line.startswith("{"):
                self.why = line
            elif "ready" in (record := json.loads(line)):
                break
            else:
                self.start.append(record)

    def read_line(self):
        while b"\n" not in self.buffer:
            left = self.deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise OutOfTime
            part = os.read(self.process.stdout.fileno(), 65536)
            if not part:
                return None
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line.decode()

    def measure(self, case):
        if self.why is not None:
            return []
        records = []
        try:
            self.process.stdin.write((case + "\n").encode())
            self.process.stdin.flush()
            while (line := self.read_line()) is not None:
                record = json.loads(line)
                if "done" in record:
                    return records
                records.append(record)
        except BrokenPipeError:
            pass
        self.why = f"peer not run: its program ended during {case}"
        return records

    def stop(self):
        self.process.kill()
        self.process.wait()


def measure_ours(arguments, case, deadline):
    left = deadline - time.monotonic()
    if left <= 0:
        raise OutOfTime
    command = [arguments.longspan, "bench", arguments.op, "--device", arguments.device, "--json",
               "--problem", case, "--seconds", str(arguments.seconds), "--repeats",
               str(arguments.repeats), "--threads", str(arguments.threads)]
    if arguments.op == "attention" and arguments.device == "cpu":
        command += ["--impl", "best"]
    for setting in arguments.set:
        command += ["--set", setting]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
    except subprocess.TimeoutExpired as expired:
        raise OutOfTime from expired
    if run.returncode != 0:
        raise RuntimeError(f"{case}: {run.stderr.strip().splitlines()[-1] if run.stderr.strip() else 'no message'}")
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def merged(rounds):
    """One record of each (impl, pass), with the medians over the rounds."""
    by_key = {}
    for record in rounds:
        by_key.setdefault((record["impl"], record["pass"]), []).append(record)
    result = []
    for same in by_key.values():
        timed = [r for r in same if r.get("ms_median") is not None]
        record = dict((timed or same)[0], rounds=len(timed))
        for field in ("ms_median", "ms_p90", "floor_ms", "peak_gflops", "peak_gbps", "attention_ms"):
            values = [r[field] for r in timed if r.get(field) is not None]
            if values:
                record[field] = statistics.median(values)
        if record.get("floor_ms") is not None:
            record["fraction_of_floor"] = record["floor_ms"] / record["ms_median"]
        if record.get("tokens_per_s") and len(timed) > 1:
            record["tokens_per_s"] = statistics.median(r["tokens_per_s"] for r in timed)
        result.append(record)
    return result


def join(ours, peers):
    """Names in each of our records the fastest peer; gives peers the facts that only we know."""
    for record in ours:
        same = [p for p in peers if p["pass"] == record["pass"] and p.get("ms_median") is not None]
        if same:
            best = min(same, key=lambda p: p["ms_median"])
            record["peer"], record["peer_ms_median"] = best["impl"], best["ms_median"]
        for peer in same:
            for field in ("flops", "bytes", "visible_fraction", "block_fraction"):
                peer[field] = record.get(field)
    return ours + peers


def best_peaks(machines):
    """One machine record of all rounds: what the machine reaches in a quiet moment."""
    best = dict(machines[0])
    for key, value in best.items():
        if isinstance(value, float):
            best[key] = max(machine[key] for machine in machines)
    return best


def check_same_model(ours, peers):
    """Whether a peer's step is the same work: raises RuntimeError."""
    for peer in (p for p in peers if p.get("parameters")):
        for record in ours:
            if record["parameters"] != peer["parameters"]:
                raise RuntimeError(f"{record['case']}: {record['parameters']:.0f} parameters, but "
                                   f"{peer['impl']} has {peer['parameters']:.0f}")
            for loss in (record["first_loss"], peer["first_loss"]):
                expected = math.log(peer["vocab_size"])
                if not abs(loss - expected) < LOSS_TOLERANCE * expected:
                    raise RuntimeError(f"{record['case']}: a first loss is {loss:.3f}, and untrained models "
                                       f"of {peer['vocab_size']} words have {expected:.3f}")


def names_of(arguments):
    default = os.path.join(HERE, "problems", PROBLEMS[arguments.op, arguments.device])
    if arguments.op == "step":
        return arguments.problem or [default]
    return read_names(arguments.problem or [default])


def compare(arguments, out):
    deadline = time.monotonic() + arguments.budget
    command = shlex.split(arguments.peer) if arguments.peer else [
        sys.executable, os.path.join(HERE, "peers", PEERS[arguments.op, arguments.device])]
    command += ["--serve", "--seconds", str(arguments.seconds)]
    if arguments.device == "cpu":
        command += ["--threads", str(arguments.threads), "--repeats", str(arguments.repeats)]
    for setting in arguments.set:
        command += ["--set", setting]
    peer = Peer(command, deadline)
    cases = names_of(arguments)
    done, errors = 0, 0
    try:
        for record in peer.start:
            print(json.dumps(record), file=out, flush=True)
        for case in cases:
            ours, theirs = [], []
            try:
                for _ in range(arguments.rounds):
                    ours += measure_ours(arguments, case, deadline)
                    theirs += peer.measure(case)
                machines = [record for record in ours if record["op"] == "machine"]
                timed = merged([record for record in ours if record["op"] == arguments.op])
                peers = merged(theirs)
                check_same_model(timed, peers)
            except RuntimeError as error:
                print(error)
                errors += 1
                continue
            for record in machines[:1] and [best_peaks(machines)]:
                print(json.dumps(record), file=out, flush=True)
            for record in join(timed, peers):
                print(json.dumps(record), file=out, flush=True)
            done += 1
            print(f"{case}: {arguments.rounds} rounds", flush=True)
    except OutOfTime:
        print(f"out of time: {done} of {len(cases)} cases")
    finally:
        peer.stop()
    if peer.why:
        print(peer.why)
    if errors:
        return 1
    return 0 if done == len(cases) and peer.why is None else 3


def arguments_of(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="?", default="attention", choices=["attention", "step"])
    parser.add_argument("--longspan", required=True)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", required=True)
    parser.add_argument("--peer", help="command of the peers' program")
    parser.add_argument("--problem", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--budget", type=float, default=480)
    arguments = parser.parse_args(words)
    if (arguments.op, arguments.device) not in PEERS:
        parser.error(f"there is no peer for {arguments.op} on {arguments.device}")
    if arguments.set and arguments.op != "step":
        parser.error("--set is for step")
    return arguments


def main():
    arguments = arguments_of()
    with open(arguments.out, "a", encoding="utf-8") as out:
        try:
            return compare(arguments, out)
        except OutOfTime:
            print("out of time before the peers were ready")
            return 3


if __name__ == "__main__":
    sys.exit(main())
