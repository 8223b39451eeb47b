"""What the command line tests share: running the program and looking at how it ended."""

import json
import subprocess
import sys
import tempfile
import unittest

PROGRAM = REPOSITORY = None


def run(*arguments, folder=None):
    return subprocess.run([PROGRAM, *arguments], cwd=folder, text=True, capture_output=True,
                          timeout=200, check=False)


class CliTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = temporary.name

    def succeed(self, *arguments):
        """Runs in a folder of its own and returns the output."""
        done = run(*arguments, folder=self.folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def succeed_json(self, *arguments):
        return json.loads(self.succeed(*arguments, "--json"))

    def fail(self, *arguments, mentions):
        """Exit code 2, nothing on standard output, one line that mentions all of `mentions`."""
        done = run(*arguments, folder=self.folder)
        self.assertEqual(done.returncode, 2, done.stdout + done.stderr)
        self.assertEqual(done.stdout, "")
        self.assertEqual(len(done.stderr.strip().splitlines()), 1, done.stderr)
        for part in mentions:
            self.assertIn(part, done.stderr)


def main():
    global PROGRAM, REPOSITORY
    PROGRAM, REPOSITORY = sys.argv[1], sys.argv[2]
    unittest.main(argv=sys.argv[:1], module="__main__")
