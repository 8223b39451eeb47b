#!/usr/bin/env python3
"""A bundle, unpacked elsewhere: size, where its libraries come from, what it says, and whether it trains.

usage: bundle_test.py ARCHIVE        (needs no GPU; passes where there is one, too)
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

LIMIT_BYTES = 50 << 20
ARCHIVE = None
QUIET = {"PATH": "/usr/bin:/bin"}  # nothing of the build environment


class BundleTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        subprocess.run(["tar", "-xf", ARCHIVE, "-C", cls.folder], check=True)
        cls.root = os.path.join(cls.folder, "longspan")

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)

    def run_program(self, *arguments):
        return subprocess.run([os.path.join(self.root, "bin", arguments[0]), *arguments[1:]],
                              env=QUIET, capture_output=True, text=True, check=False,
                              cwd=self.folder, timeout=300)

    def test_size(self):
        self.assertLess(os.path.getsize(ARCHIVE), LIMIT_BYTES)

    def test_it_starts(self):
        run = self.run_program("longspan", "--version")
        self.assertEqual((run.returncode, run.stdout[:9]), (0, "longspan "), run.stderr)

    def test_libraries_come_from_the_bundle(self):
        with open(os.path.join(self.root, "lib", "EXTERNAL"), encoding="utf-8") as file:
            external = {line.split()[0] for line in file}
        self.assertFalse([e for e in external if not re.match(r"lib(cublas|cublasLt|nccl)\.so\.\d+$", e)])
        loader = glob.glob(os.path.join(self.root, "lib", "ld-linux*"))[0]
        for name in ("longspan", "longspan_gpu_tests"):
            trace = subprocess.run([loader, "--list", "--library-path", os.path.join(self.root, "lib"),
                                    os.path.join(self.root, "libexec", name)], env=QUIET,
                                   capture_output=True, text=True, check=False)
            loaded = re.findall(r"^\s*(\S+) => (\S+)", trace.stdout, re.M)
            self.assertGreater(len(loaded), 5, trace.stdout + trace.stderr)
            foreign = [f"{soname} => {path}" for soname, path in loaded
                       if not path.startswith(self.root) and soname not in external]
            self.assertEqual(foreign, [], name)

    def test_the_tests_are_listed_and_smoke_patterns_name_some(self):
        run = subprocess.run([sys.executable, os.path.join(self.root, "tests/gpu/check_smoke.py"),
                              os.path.join(self.root, "bin/longspan_gpu_tests")],
                             env=QUIET, capture_output=True, text=True, check=False)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)

    def test_it_trains_on_cpu_and_refuses_a_gpu_that_is_not_there(self):
        corpus = os.path.join(self.folder, "corpus")
        run = self.run_program("longspan", "prepare", os.path.join(self.root, "ops"), "--tokenizer",
                               "byte", "--out", corpus, "--validation-fraction", "0.05")
        self.assertEqual(run.returncode, 0, run.stderr)

        def train(name, *options):
            return self.run_program(
                "longspan", "train", os.path.join(self.root, "configs/quickstart.textproto"), "--run-dir",
                os.path.join(self.folder, name), "--set", f"data.train[0].path={corpus}/train",
                "--set", f"data.validation[0].path={corpus}/validation", "--set", "run.steps=3",
                "--set", "run.context_length=256", "--set", "run.global_batch_tokens=512",
                "--set", "parallel.cp=1", "--set", "evaluation.rows=1",
                "--set", "schedule.cosine.warmup_steps=1", *options)

        run = train("cpu")
        self.assertEqual(run.returncode, 0, run.stderr)
        with open(os.path.join(self.folder, "cpu", "metrics.jsonl"), encoding="utf-8") as file:
            steps = [json.loads(line) for line in file]
        self.assertEqual([s["step"] for s in steps if "loss" in s], [1, 2, 3])
        run = train("gpu", "--set", "run.device=CUDA")
        if run.returncode != 0:  # with a GPU it trains
            self.assertEqual(run.returncode, 2, run.stderr)
            self.assertRegex(run.stderr, r"run\.device.*(GPU|driver|device)")
            self.assertEqual(len(run.stderr.strip().splitlines()), 1, run.stderr)

    def test_a_missing_library_is_named(self):
        copy = os.path.join(self.folder, "copy")
        shutil.copytree(os.path.join(self.root, "bin"), os.path.join(copy, "bin"))
        os.mkdir(os.path.join(copy, "lib"))
        with open(os.path.join(copy, "lib", "EXTERNAL"), "w", encoding="utf-8") as file:
            file.write("libnothing.so.9 Nothing; with pip: nothing\n")
        run = subprocess.run([os.path.join(copy, "bin", "longspan")], env=QUIET, capture_output=True,
                             text=True, check=False)
        self.assertEqual(run.returncode, 2)
        self.assertIn("libnothing.so.9 (Nothing; with pip: nothing)", run.stderr)

    def test_libraries_of_python_packages_are_found(self):
        """A library that exists only under site-packages/nvidia/*/lib reaches the loader's path."""
        copy = os.path.join(self.folder, "python")
        packages = os.path.join(copy, "site")
        os.makedirs(os.path.join(packages, "nvidia", "nothing", "lib"))
        open(os.path.join(packages, "nvidia", "nothing", "lib", "libnothing.so.9"), "wb").close()
        for folder in ("bin", "lib", "libexec"):
            os.makedirs(os.path.join(copy, folder))
        shutil.copy(os.path.join(self.root, "bin", "longspan"), os.path.join(copy, "bin"))
        loader = os.path.join(copy, "lib", "ld-linux-fake.so")
        with open(loader, "w", encoding="utf-8") as file:
            file.write('#!/bin/sh\necho "$@"\n')
        os.chmod(loader, 0o755)
        with open(os.path.join(copy, "lib", "EXTERNAL"), "w", encoding="utf-8") as file:
            file.write("libnothing.so.9 Nothing\n")
        run = subprocess.run([os.path.join(copy, "bin", "longspan"), "--version"], capture_output=True,
                             env={**QUIET, "PYTHONPATH": packages}, text=True, check=False)
        self.assertIn(f"{copy}/lib:{packages}/nvidia/nothing/lib", run.stdout, run.stderr)
        self.assertIn(f"{copy}/libexec/longspan --version", run.stdout)


if __name__ == "__main__":
    ARCHIVE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
