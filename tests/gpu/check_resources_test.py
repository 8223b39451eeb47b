"""The resource check on canned reports: what passes, and that each kind of problem is found."""

import json
import os
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import check_resources as checked  # noqa: E402

SYMBOL = ("_ZN8longspan3ops8internal49_GLOBAL__N__db4fc492_16_rms_norm_cuda_cu_b1cce5f0"
          "13ForwardKernelILi8ENS_4BF16EEEvlPKT0_PKfdPS5_Pf")
NAME = "ForwardKernel<8,BF16>"
SOURCE = "ops/norm/rms_norm_cuda.cu"


def report(arch="sm_90a", registers=32, spill=0, extra="", smem=", 96 bytes smem"):
    return (f"ptxas info    : 0 bytes gmem\n"
            f"ptxas info    : Compiling entry function '{SYMBOL}' for '{arch}'\n"
            f"ptxas info    : Function properties for {SYMBOL}\n"
            f"    {spill} bytes stack frame, {spill} bytes spill stores, {2 * spill} bytes spill loads\n"
            f"{extra}"
            f"ptxas info    : Used {registers} registers, used 1 barriers{smem}, 416 bytes cmem[0]\n"
            f"ptxas info    : Compile time = 54.7 ms\n")


class Parser(unittest.TestCase):
    def test_numbers(self):
        kernels, notes = checked.parse_report(report() + report("sm_80", 40, smem=""))
        self.assertEqual(kernels, {(SYMBOL, "sm_90a"): [32, 96, 0], (SYMBOL, "sm_80"): [40, 0, 0]})
        self.assertEqual(notes, [])

    def test_spills_of_kernels_and_of_functions_that_were_not_inlined(self):
        self.assertEqual(checked.parse_report(report(spill=8))[0][SYMBOL, "sm_90a"][2], 24)
        extra = ("ptxas info    : Function properties for helper\n"
                 "    16 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n")
        kernels = checked.parse_report(report(extra=extra))[0]
        self.assertEqual(kernels["helper", "sm_90a"], [0, 0, 8])
        self.assertEqual(kernels[SYMBOL, "sm_90a"], [32, 96, 0])

    def test_notes_about_wgmma(self):
        note = ("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
                "serialized due to insufficient register resources\n")
        self.assertEqual(len(checked.parse_report(note + report())[1]), 1)

    def test_a_report_that_breaks_off_is_an_error(self):
        with self.assertRaises(ValueError):
            checked.parse_report(report().split("ptxas info    : Used")[0])

    def test_names(self):
        short = checked.short_name
        self.assertEqual(short("void longspan::ops::internal::(anonymous namespace)::"
                               "ForwardKernel<8, longspan::BF16>(long, longspan::BF16 const*)"), NAME)
        self.assertEqual(short("longspan::cuda::Fill(float*, long)"), "cuda::Fill")
        self.assertEqual(short("void longspan::K<(bool)1, longspan::F<float (*)(int)>, (int)64>(int)"),
                         "K<1,F<float(*)(int)>,64>")


class Comparison(unittest.TestCase):
    table = {"nvcc": "13.0.88", "kernels": {SOURCE: {NAME: {"sm_80": [40, 96, 0],
                                                            "sm_90a": [32, 96, 0]}}}}

    def problems(self, by_arch, version="13.0.88", name=NAME, table=None):
        return checked.compare(table or self.table, {SOURCE: {name: by_arch}}, version)

    def test_within_bounds(self):
        self.assertEqual(self.problems({"sm_90a": [32, 96, 0], "sm_80": [39, 0, 0]}), [])

    def test_an_architecture_that_was_not_built_is_not_missed(self):
        self.assertEqual(self.problems({"sm_90a": [32, 96, 0]}), [])

    def test_registers_and_shared_memory(self):
        self.assertIn("needs 33 registers, at most 32", self.problems({"sm_90a": [33, 96, 0]})[0])
        self.assertIn("needs 97 shared_bytes", self.problems({"sm_90a": [32, 97, 0]})[0])

    def test_other_compilers_are_checked_for_spills_only(self):
        self.assertEqual(self.problems({"sm_90a": [99, 96, 0]}, "13.1.2"), [])
        self.assertIn("spills 4 bytes", self.problems({"sm_90a": [32, 96, 4]}, "13.1.2")[0])

    def test_a_spill_that_the_table_allows(self):
        table = {"nvcc": "13.0.88", "kernels": {SOURCE: {NAME: {"sm_90a": [32, 96, 8]}}}}
        self.assertEqual(len(self.problems({"sm_90a": [32, 96, 8]}, table=table)), 2)

    def test_unknown_and_vanished_kernels(self):
        problems = self.problems({"sm_90a": [32, 96, 0]}, name="Other<8>")
        self.assertIn('add "Other<8>": {"sm_90a": [32, 96, 0]}', problems[0])
        self.assertIn(f"{NAME} for sm_90a is in the table but not in the build", problems[1])


class WholeRuns(unittest.TestCase):
    """The program on a build directory with one object."""

    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.build = self.directory.name
        target = os.path.join(self.build, "x.cu.o")
        open(target, "w", encoding="utf-8").close()
        self.write("compile_commands.json", json.dumps(
            [{"directory": self.build, "file": "/source/" + SOURCE, "command": "nvcc -c y -o x.cu.o -x"}]))
        self.write("CMakeCache.txt", "CMAKE_HOME_DIRECTORY:INTERNAL=/source\n")
        self.table = os.path.join(self.build, "resources.json")

    def tearDown(self):
        self.directory.cleanup()

    def write(self, name, text):
        with open(os.path.join(self.build, name), "w", encoding="utf-8") as file:
            file.write(text)

    def run_check(self, *options):
        run = subprocess.run(
            [sys.executable, os.path.join(HERE, "check_resources.py"), self.build, "--table", self.table,
             "--nvcc-version", "13.0.88", *options], capture_output=True, text=True, check=False)
        return run.returncode, run.stdout + run.stderr

    def test_update_then_check_then_a_worse_kernel(self):
        self.write("x.cu.o.resources", report() + report("sm_80", 40))
        self.assertEqual(self.run_check("--update")[0], 0)
        self.assertEqual(self.run_check()[0], 0)
        self.write("x.cu.o.resources", report(registers=64))
        status, output = self.run_check()
        self.assertEqual(status, 1)
        self.assertIn("needs 64 registers", output)

    def test_update_refuses_spills(self):
        self.write("x.cu.o.resources", report(spill=8))
        self.assertEqual(self.run_check("--update")[0], 1)
        self.assertFalse(os.path.exists(self.table))

    def test_a_missing_report(self):
        self.write("x.cu.o.resources", report())
        self.run_check("--update")
        os.remove(os.path.join(self.build, "x.cu.o.resources"))
        status, output = self.run_check()
        self.assertEqual(status, 1)
        self.assertIn("no resource report", output)


class Launcher(unittest.TestCase):
    """cmake/keep_resource_report.sh takes the report out of the messages and nothing else."""

    def test_report_and_warnings_are_parted_and_the_status_is_kept(self):
        script = os.path.join(HERE, "..", "..", "cmake", "keep_resource_report.sh")
        with tempfile.TemporaryDirectory() as directory:
            compiler = os.path.join(directory, "compiler")
            with open(compiler, "w", encoding="utf-8") as file:
                file.write(f"#!/bin/sh\ncat >&2 <<'END'\n{report()}x.cu(3): warning: unused\nEND\nexit 3\n")
            os.chmod(compiler, 0o755)
            target = os.path.join(directory, "x.o")
            run = subprocess.run([script, compiler, "-c", "x.cu", "-o", target], capture_output=True,
                                 text=True, check=False)
            self.assertEqual(run.returncode, 3)
            self.assertEqual(run.stderr, "x.cu(3): warning: unused\n")
            with open(target + ".resources", encoding="utf-8") as file:
                self.assertEqual(file.read(), report())
            run = subprocess.run([script, compiler, "--version"], capture_output=True, text=True,
                                 check=False)
            self.assertIn("Used 32 registers", run.stderr)


if __name__ == "__main__":
    unittest.main()
