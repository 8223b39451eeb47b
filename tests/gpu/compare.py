#!/usr/bin/env python3
"""Longspan's attention and its peers on the same cases, in alternating rounds on one machine.

usage: compare.py --longspan FILE --out FILE [--peer COMMAND] [--problem NAME_OR_FILE]... [--rounds N]
                  [--seconds S] [--budget S]

Each round of a case measures `longspan bench attention --json`, then the peers (tests/bench/peers/gpu.py,
kept running with --serve, so that it compiles once). Written as JSON lines, as each case ends: our
records with the medians over the rounds and the fastest peer in `peer` and `peer_ms_median`, and those
of each peer. Exit status 0 when every case was measured, 3 when the budget ended first or no peer ran,
1 for errors.
"""

import argparse
import json
import os
import select
import shlex
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
PEERS = os.path.join(HERE, "..", "bench", "peers", "gpu.py")
PROBLEMS = os.path.join(HERE, "..", "bench", "problems", "attention_gpu.txt")


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


def measure_ours(longspan, case, seconds, deadline):
    left = deadline - time.monotonic()
    if left <= 0:
        raise OutOfTime
    command = [longspan, "bench", "attention", "--device", "cuda", "--json", "--problem", case,
               "--seconds", str(seconds)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
    except subprocess.TimeoutExpired as expired:
        raise OutOfTime from expired
    if run.returncode != 0:
        raise RuntimeError(f"{case}: {run.stderr.strip().splitlines()[-1] if run.stderr.strip() else 'no message'}")
    records = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return [record for record in records if record.get("op") == "attention"]


def merged(rounds):
    """One record of each (impl, pass), with the medians over the rounds."""
    by_key = {}
    for record in rounds:
        by_key.setdefault((record["impl"], record["pass"]), []).append(record)
    result = []
    for same in by_key.values():
        timed = [r for r in same if r.get("ms_median") is not None]
        record = dict((timed or same)[0], rounds=len(timed))
        for field in ("ms_median", "ms_p90", "floor_ms", "peak_gflops", "peak_gbps"):
            values = [r[field] for r in timed if r.get(field) is not None]
            if values:
                record[field] = statistics.median(values)
        if record.get("floor_ms") is not None:
            record["fraction_of_floor"] = record["floor_ms"] / record["ms_median"]
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


def names_of(problems):
    names = []
    for problem in problems:
        if os.path.isfile(problem):
            with open(problem, encoding="utf-8") as lines:
                names += [name for line in lines if (name := line.split("#")[0].strip())]
        else:
            names.append(problem)
    return names


def compare(arguments, out):
    deadline = time.monotonic() + arguments.budget
    command = shlex.split(arguments.peer) if arguments.peer else [sys.executable, PEERS]
    peer = Peer([*command, "--serve", "--seconds", str(arguments.seconds)], deadline)
    cases = names_of(arguments.problem or [PROBLEMS])
    done, errors = 0, 0
    try:
        for record in peer.start:
            print(json.dumps(record), file=out, flush=True)
        for case in cases:
            ours, theirs = [], []
            try:
                for _ in range(arguments.rounds):
                    ours += measure_ours(arguments.longspan, case, arguments.seconds, deadline)
                    theirs += peer.measure(case)
            except RuntimeError as error:
                print(error)
                errors += 1
                continue
            for record in join(merged(ours), merged(theirs)):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longspan", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--peer", help="command of the peers' program")
    parser.add_argument("--problem", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--budget", type=float, default=480)
    arguments = parser.parse_args()
    with open(arguments.out, "a", encoding="utf-8") as out:
        try:
            return compare(arguments, out)
        except OutOfTime:
            print("out of time before the peers were ready")
            return 3


if __name__ == "__main__":
    sys.exit(main())
