#!/usr/bin/env python3
"""Each pattern of tests/gpu/smoke.txt names a test. Usage: check_smoke.py LONGSPAN_GPU_TESTS (no GPU needed)"""

import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def main():
    with open(os.path.join(HERE, "smoke.txt"), encoding="utf-8") as file:
        patterns = [pattern for line in file if (pattern := line.split("#")[0].strip())]
    dead, total = [], 0
    for pattern in patterns:
        run = subprocess.run([sys.argv[1], "--gtest_list_tests", f"--gtest_filter={pattern}"],
                             capture_output=True, text=True, check=True)
        count = sum(line.startswith("  ") for line in run.stdout.splitlines())
        total += count
        if count == 0:
            dead.append(f"tests/gpu/smoke.txt: {pattern} names no test of {os.path.basename(sys.argv[1])}")
    print("\n".join(dead + [f"smoke: {total} tests of {len(patterns)} patterns"]))
    return 1 if dead or not patterns else 0


if __name__ == "__main__":
    sys.exit(main())
