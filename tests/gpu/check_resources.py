#!/usr/bin/env python3
"""Compares what the compiler says about kernels with the upper bounds in tests/gpu/resources.json.

usage: check_resources.py BUILD_DIR [--update] [--table FILE] [--nvcc-version V]

Reads the reports that cmake/keep_resource_report.sh left beside the objects of a cuda build. Fails when
  - a kernel needs more registers or static shared memory than the table allows,
  - any kernel spills, or ptxas notes that it serialises or waits for wgmma (C75xx),
  - a kernel is missing in the table (the line to add is printed), or a line has no kernel any more.
Numbers are compared only under the nvcc version that the table names; spills and notes always.
--update writes the table from the reports; it refuses kernels that spill.
"""

import argparse
import json
import os
import re
import subprocess
import sys

TABLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "resources.json")
COLUMNS = ("registers", "shared_bytes", "spill_bytes")
COMPILING = re.compile(r"ptxas info\s*: Compiling entry function '(\S+)' for '(\w+)'")
PROPERTIES = re.compile(r"ptxas info\s*: Function properties for (\S+)")
FRAME = re.compile(r"\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"ptxas info\s*: Used (\d+) registers(.*)")
SHARED = re.compile(r"(\d+) bytes smem")
NOTE = re.compile(r"\(C75\d\d\)")
# What is the same in every name and says nothing.
NOISE = re.compile(r"longspan::|ops::|parallel::|internal::|\(anonymous namespace\)::"
                   r"|\((?:int|long|unsigned int|bool)\)(?=-?\d)")


def parse_report(text):
    """({(symbol, arch): [registers, shared bytes, spill bytes]}, [C75xx notes])."""
    kernels, notes, entry, arch, function = {}, [], None, None, None
    for line in text.splitlines():
        if NOTE.search(line):
            notes.append(line.strip())
        elif match := COMPILING.match(line):
            entry, arch = match.groups()
            function = entry
            kernels[entry, arch] = [None, 0, 0]
        elif match := PROPERTIES.match(line):
            function = match.group(1)
        elif match := FRAME.match(line):
            spill = int(match.group(1)) + int(match.group(2))
            if spill and function != entry:  # a device function that was not inlined
                kernels.setdefault((function, arch), [0, 0, 0])[2] += spill
            elif spill:
                kernels[entry, arch][2] += spill
        elif match := USED.match(line):
            kernels[entry, arch][0] = int(match.group(1))
            shared = SHARED.search(match.group(2))
            kernels[entry, arch][1] = int(shared.group(1)) if shared else 0
    for (symbol, where), numbers in kernels.items():
        if numbers[0] is None:
            raise ValueError(f"the report on {symbol} for {where} ends before its registers")
    return kernels, notes


def short_name(demangled):
    """Kernel<template arguments> of a demangled signature: without return type, parameters and
    the namespaces that all kernels share."""
    name = NOISE.sub("", demangled)
    depth, end = 0, len(name)
    for i, c in enumerate(name):  # the parameter list starts at the first ( outside of < >
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            end = i
            break
    name = name[:end]
    depth, start = 0, 0
    for i, c in enumerate(name):  # the return type ends at the last blank outside of < >
        depth += (c == "<") - (c == ">")
        if c == " " and depth == 0:
            start = i + 1
    return name[start:].replace(" ", "")


def demangle(symbols):
    run = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True,
                         check=True)
    return dict(zip(symbols, run.stdout.split("\n")))


def objects_of(build):
    """{source path from the repository root: object} of the CUDA sources that are built now."""
    with open(os.path.join(build, "compile_commands.json"), encoding="utf-8") as file:
        commands = json.load(file)
    root = cmake_cache(build, "CMAKE_HOME_DIRECTORY")
    found = {}
    for entry in commands:
        if not entry["file"].endswith(".cu"):
            continue
        target = re.search(r" -o (\S+\.o)\b", entry["command"]).group(1)
        found[os.path.relpath(entry["file"], root)] = os.path.join(entry["directory"], target)
    return found


def cmake_cache(build, name):
    with open(os.path.join(build, "CMakeCache.txt"), encoding="utf-8") as file:
        return re.search(rf"^{name}:\w+=(.*)$", file.read(), re.M).group(1)


def nvcc_version(build):
    nvcc = cmake_cache(build, "CMAKE_CUDA_COMPILER")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV(\d+(?:\.\d+)+)", text).group(1)


def read_build(build):
    """({source: {kernel: {arch: numbers}}}, problems)."""
    kernels, problems = {}, []
    objects = objects_of(build)
    if not objects:
        problems.append(f"{build}: no CUDA source is part of this build")
    for source, target in sorted(objects.items()):
        if not os.path.exists(target):
            continue  # of a target that was not asked for
        try:
            with open(target + ".resources", encoding="utf-8") as file:
                found, notes = parse_report(file.read())
        except FileNotFoundError:
            problems.append(f"{source}: no resource report beside its object; build it again")
            continue
        problems += [f"{source}: {note}" for note in notes]
        names = demangle([symbol for symbol, _ in found])
        for (symbol, arch), numbers in found.items():
            by_arch = kernels.setdefault(source, {}).setdefault(short_name(names[symbol]), {})
            known = by_arch.get(arch, numbers)  # two kernels of one short name share the larger needs
            by_arch[arch] = [max(pair) for pair in zip(known, numbers)]
    if not kernels and not problems:
        problems.append(f"{build}: no CUDA object has been built")
    return kernels, problems


def line_of(name, by_arch):
    return f"{json.dumps(name)}: {json.dumps(by_arch, sort_keys=True)}"


def spills(kernels):
    return [f"{source}: {name} for {arch} spills {numbers[2]} bytes"
            for source, by_name in kernels.items() for name, by_arch in by_name.items()
            for arch, numbers in by_arch.items() if numbers[2] > 0]


def compare(table, kernels, version):
    """Problems of the kernels that were built, against the table."""
    problems = spills(kernels)
    for source, by_name in table["kernels"].items():
        problems += [f"{source}: the table allows {name} for {arch} to spill; no kernel may"
                     for name, by_arch in by_name.items()
                     for arch, bounds in by_arch.items() if bounds[2] > 0]
    if version != table["nvcc"]:
        return problems
    architectures = {arch for by_name in kernels.values() for by_arch in by_name.values()
                     for arch in by_arch}
    for source, by_name in kernels.items():
        for name, by_arch in by_name.items():
            listed = table["kernels"].get(source, {}).get(name, {})
            if missing := {a: n for a, n in by_arch.items() if a not in listed}:
                problems.append(f"{source}: not in the table; add {line_of(name, missing)}")
            for arch in by_arch.keys() & listed.keys():
                problems += [f"{source}: {name} for {arch} needs {got} {what}, at most {most} are allowed"
                             for what, got, most in zip(COLUMNS, by_arch[arch], listed[arch])
                             if got > most and what != "spill_bytes"]
    for source, by_name in table["kernels"].items():
        for name, by_arch in by_name.items():
            problems += [f"{source}: {name} for {arch} is in the table but not in the build"
                         for arch in by_arch
                         if arch in architectures and arch not in kernels.get(source, {}).get(name, {})]
    return problems


def write_table(path, kernels, version):
    blocks = [f"    {json.dumps(source)}: {{\n" +
              ",\n".join("      " + line_of(name, by_name[name]) for name in sorted(by_name)) + "\n    }"
              for source, by_name in sorted(kernels.items())]
    with open(path, "w", encoding="utf-8") as file:
        file.write("{\n"
                   f'  "nvcc": {json.dumps(version)},\n'
                   f'  "columns": {json.dumps(COLUMNS)},\n'
                   '  "kernels": {\n' + ",\n".join(blocks) + "\n  }\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--table", default=TABLE)
    parser.add_argument("--nvcc-version")
    arguments = parser.parse_args()
    kernels, problems = read_build(arguments.build)
    version = arguments.nvcc_version or nvcc_version(arguments.build)
    if arguments.update:
        problems += spills(kernels)
        if not problems:
            write_table(arguments.table, kernels, version)
    else:
        with open(arguments.table, encoding="utf-8") as file:
            table = json.load(file)
        problems += compare(table, kernels, version)
        if version != table["nvcc"]:
            print(f"the table is for nvcc {table['nvcc']}, not {version}: only spills and wgmma notes "
                  "are checked")
    print("\n".join(problems))
    count = sum(len(by_name) for by_name in kernels.values())
    print(f"resources: {count} kernels of {len(kernels)} files, nvcc {version}: "
          f"{f'{len(problems)} problems' if problems else 'all within bounds'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
