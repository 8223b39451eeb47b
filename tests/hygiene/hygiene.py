"""Checks of the source tree that no compiler makes. Usage: hygiene.py CHECK SOURCE_DIR [BUILD_DIR COMPILER]

CHECK is one of: edges, kernels, listed, suites, environment, headers, leaves, length, copies.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

FOLDERS = ["ops", "parallel", "data", "configs", "trainer", "launch", "tests"]
SOURCE = (".h", ".cpp", ".cu", ".cuh")

# Who may include whom; a folder may always include itself. The longest matching prefix counts.
ALLOWED = {
    "ops/core": [],
    "ops": ["ops"],
    "parallel": ["ops", "parallel"],
    "data": ["ops/core", "data"],
    "configs": ["ops/core/error.h", "configs"],
    "trainer": ["ops", "parallel", "data", "configs", "trainer"],
    "launch": ["ops", "parallel", "data", "configs", "trainer", "launch"],
    "tests": FOLDERS,
}
# Op headers and sources do not know autograd; only it includes them.
AUTOGRAD = "ops/autograd"
# Where protobuf may be seen.
PROTOBUF = ("configs/", "trainer/from_config", "trainer/checkpoint/", "trainer/metrics/", "tests/",
            "launch/cli/inspect")
CUDA_PLACES = re.compile(r"_cuda\.|\.cuh?$|^ops/core/cuda/|^parallel/comm/nccl\.|^tests/emulated_cuda/"
                         r"|^tests/parallel/comm/nccl_")
# Of ops/core/cuda, the header that names nothing of CUDA.
PLAIN_CUDA_HEADER = "ops/core/cuda/backend.h"
# Where code may differ between a GPU and the emulated one, and where PTX is written.
DEVICE_CORE = ("ops/core/cuda/", "tests/")
PTX_PLACES = re.compile(r"^ops/core/cuda/ptx(_sm90)?\.cuh$|^tests/")
ENVIRONMENT_FILE = "parallel/comm/bootstrap.cpp"


def sources(root):
    for folder in FOLDERS:
        for directory, _, names in os.walk(os.path.join(root, folder)):
            for name in sorted(names):
                if name.endswith(SOURCE):
                    yield os.path.relpath(os.path.join(directory, name), root)


def text_of(root, path):
    with open(os.path.join(root, path), encoding="utf-8") as file:
        return file.read()


def includes(text):
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', text, re.M)


def layer_of(path):
    fits = [layer for layer in ALLOWED if path == layer or path.startswith(layer + "/")]
    return max(fits, key=len)


def within(path, places):
    return any(path == place or path.startswith(place + "/") for place in places)


def edge_problems(path, text):
    problems = []
    layer = layer_of(path)
    for kind, target in includes(text):
        if kind == '"':
            known = target.split("/")[0] in FOLDERS
            if not known:
                problems.append(f"{path}: include \"{target}\" by its path from the root")
            elif not within(target, [layer] + ALLOWED[layer]):
                problems.append(f"{path}: {layer} may not include {target}")
            elif (layer == "ops" and target.startswith(AUTOGRAD + "/")
                  and not path.startswith(AUTOGRAD + "/")):
                problems.append(f"{path}: ops do not include autograd ({target})")
        if ("google/protobuf" in target or target.endswith(".pb.h")) and not path.startswith(PROTOBUF):
            problems.append(f"{path}: protobuf is not seen here ({target})")
        if re.match(r"(cuda|cublas|nccl|nvtx)", target) and not CUDA_PLACES.search(path):
            problems.append(f"{path}: CUDA headers stay in *_cuda.*, ops/core/cuda, nccl.* ({target})")
    return problems


def cuda_problems(path, text):
    """What only some places may see of CUDA, and what no kernel may use."""
    problems = []
    if not CUDA_PLACES.search(path):
        problems += [f"{path}: {target} needs CUDA headers; include {PLAIN_CUDA_HEADER}"
                     for kind, target in includes(text)
                     if kind == '"' and target != PLAIN_CUDA_HEADER
                     and (target.startswith("ops/core/cuda/") or target.endswith(".cuh"))]
    if not path.startswith(DEVICE_CORE):
        if re.search(r"\bLONGSPAN_(EMULATED_CUDA|WITH_CUDA)\b|[<\"]emulat", text):
            problems.append(f"{path}: only ops/core/cuda and tests know which device library is linked")
    if path.endswith((".cu", ".cuh")):
        if not PTX_PLACES.search(path) and re.search(r"\basm\b(\s+volatile)?\s*\(", text):
            problems.append(f"{path}: PTX is written in ops/core/cuda/ptx.cuh and ptx_sm90.cuh")
        if not path.startswith("tests/"):
            if "<<<" in text:
                problems.append(f"{path}: kernels are started by cuda::Launch")
            if re.search(r"\batomic[A-Z]\w*\s*\(", text):
                problems.append(f"{path}: atomics make results depend on the order of threads")
            if re.search(r"#\s*include\s*<(cuda_bf16|cooperative_groups|cub/|thrust/)", text):
                problems.append(f"{path}: kernels use none of CUDA's device libraries")
    return problems


def check_kernels(root):
    return [p for path in sources(root) for p in cuda_problems(path, text_of(root, path))]


def is_listed(path, lists):
    """Whether a source is named by one of the build files above it; a test also by its name without
    _test.cpp. A folder whose build file globs lists what it holds."""
    folder, name = os.path.split(path)
    stem = re.sub(r"(_test)?\.\w+$", "", name)
    while True:
        text = lists.get(folder, "")
        words = re.split(r"[\s()/;]+", text)
        if "GLOB" in words or name in words or (path.startswith("tests/") and stem in words):
            return True
        if not folder:
            return False
        folder = os.path.dirname(folder)


def check_listed(root):
    lists = {}
    for folder in FOLDERS:
        for directory, _, names in os.walk(os.path.join(root, folder)):
            if "CMakeLists.txt" in names:
                place = os.path.relpath(directory, root)
                lists[place] = text_of(root, os.path.join(place, "CMakeLists.txt"))
    return [f"{path}: no CMakeLists.txt names it, so it is never built"
            for path in sources(root) if path.endswith((".cpp", ".cu")) and not is_listed(path, lists)]


def shared_suites(texts):
    """Names of GoogleTest suites that occur in several files: those tests may end up in one executable
    (longspan_gpu_tests), where one suite has one fixture."""
    places = {}
    for path, text in texts:
        for suite in set(re.findall(r"^(?:TYPED_)?TEST(?:_F|_P)?\((\w+),", text, re.M)):
            places.setdefault(suite, []).append(path)
    return [f"{', '.join(paths)}: the test suite {suite} is in more than one file"
            for suite, paths in places.items() if len(paths) > 1]


def check_suites(root):
    return shared_suites((path, text_of(root, path)) for path in sources(root)
                         if path.startswith("tests/"))


def check_edges(root):
    return [p for path in sources(root) for p in edge_problems(path, text_of(root, path))]


def check_environment(root):
    return [f"{path}: only {ENVIRONMENT_FILE} reads the environment"
            for path in sources(root)
            if path != ENVIRONMENT_FILE and not path.startswith("tests/")
            and re.search(r"\b(secure_)?getenv\s*\(", text_of(root, path))]


def check_length(root):
    return [f"{path}: {lines} lines, more than one idea (limit 600)"
            for path in sources(root)
            if (lines := text_of(root, path).count("\n")) > 600]


def check_copies(root):
    """No file names a machine path of the people who wrote it."""
    pattern = re.compile(r"(^|[^A-Za-z0-9_.])/(root|home)/[a-z]")
    return [f"{path}: names a personal path" for path in sources(root)
            if pattern.search(text_of(root, path))]


def compile_flags(build):
    """Include folders of all targets, from the compile database."""
    with open(os.path.join(build, "compile_commands.json"), encoding="utf-8") as file:
        commands = json.load(file)
    flags = set()
    for entry in commands:
        flags.update(re.findall(r"-I\S+|-isystem \S+", entry["command"]))
    return sorted(flag for group in flags for flag in [group])


def check_headers(root, build, compiler):
    flags = [part for flag in compile_flags(build) for part in flag.split(" ")]

    def compile_one(path):
        command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wno-pragma-once-outside-header",
                   "-I" + root, *flags, "-x", "c++", os.path.join(root, path)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return f"{path}: not self-contained:\n{run.stderr}" if run.returncode else None

    headers = [path for path in sources(root) if path.endswith(".h")]
    with ThreadPoolExecutor(2) as pool:
        return [problem for problem in pool.map(compile_one, headers) if problem]


def check_leaves(root, build):
    """Objects compiled for an instruction set define nothing that the linker could merge with, or
    prefer to, the baseline's version of it."""
    with open(os.path.join(build, "compile_commands.json"), encoding="utf-8") as file:
        commands = json.load(file)
    problems, seen = [], 0
    for entry in commands:
        if not re.search(r"\s-m(avx|amx|fma|sse4)", entry["command"]):
            continue
        seen += 1
        path = os.path.relpath(entry["file"], root)
        match = re.search(r" -o (\S+\.o) ", entry["command"])
        symbols = subprocess.run(["nm", "-C", os.path.join(entry["directory"], match.group(1))],
                                 capture_output=True, text=True, check=True).stdout
        for line in symbols.splitlines():
            kind = line.split(None, 2)[1] if line[:1] != " " else line.split(None, 1)[0]
            if kind in "WVu" and kind != "U":
                problems.append(f"{path}: weak symbol: {line}")
        for kind, target in includes(text_of(root, path)):
            if kind == "<" and not target.endswith("intrin.h") and target not in ("stdint.h", "stddef.h"):
                problems.append(f"{path}: includes <{target}>; leaves include intrinsics and one header")
    if seen == 0 and os.uname().machine == "x86_64":
        problems.append("no object for an instruction set was found: the check looks at nothing")
    return problems


def self_test():
    """Each textual check rejects an example of what it is for."""
    assert edge_problems("ops/core/a.h", '#include "ops/gemm/gemm.h"\n')
    assert edge_problems("data/a.cpp", '#include "parallel/comm/self.h"\n')
    assert edge_problems("ops/norm/a.cpp", '#include "ops/autograd/tape.h"\n')
    assert edge_problems("trainer/loop.cpp", '#include "x.pb.h"\n')
    assert edge_problems("trainer/loop.cpp", "#include <cuda_runtime.h>\n")
    assert not edge_problems("trainer/loop.cpp", '#include "ops/core/tensor.h"\n')
    assert cuda_problems("trainer/loop.cpp", '#include "ops/core/cuda/runtime.h"\n')
    assert not cuda_problems("trainer/loop.cpp", '#include "ops/core/cuda/backend.h"\n')
    assert cuda_problems("ops/norm/a_cuda.cu", "#ifdef LONGSPAN_EMULATED_CUDA\n")
    assert cuda_problems("ops/norm/a_cuda.cu", "#include <emulated_ptx.h>\n")
    assert cuda_problems("ops/norm/a_cuda.cu", "Kernel<<<1, 2>>>();")
    assert cuda_problems("ops/norm/a_cuda.cu", "atomicAdd(x, 1);")
    assert cuda_problems("ops/norm/a_cuda.cu", "#include <cuda_bf16.h>\n")
    assert cuda_problems("ops/norm/a_cuda.cu", 'asm volatile("exit;");')
    assert not cuda_problems("ops/core/cuda/ptx.cuh", '#include <emulated_ptx.h>\nasm("exit;");')
    assert shared_suites([("a", "TEST(X, One)"), ("b", "TEST_F(X, Two)")])
    assert not shared_suites([("a", "TEST(X, One)"), ("b", "TEST_F(Y, Two)")])
    lists = {"ops": "norm/a.cpp", "tests/ops": "foreach(test IN ITEMS a)", "tests/x": "file(GLOB f)"}
    assert is_listed("ops/norm/a.cpp", lists) and not is_listed("ops/norm/aa.cpp", lists)
    assert is_listed("tests/ops/a_test.cpp", lists) and not is_listed("tests/ops/b_test.cpp", lists)
    assert is_listed("tests/x/b_test.cpp", lists)


def main():
    check, root = sys.argv[1], sys.argv[2]
    self_test()
    problems = globals()["check_" + check](root, *sys.argv[3:])
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
