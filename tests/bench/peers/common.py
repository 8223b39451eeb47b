"""What the peers share: the cases of `longspan bench attention` as their names say them, records with
the keys of `longspan bench --json`, and the loop that answers one case after another."""

import json
import os
import re

BLOCK = 64  # tokens of the blocks of block_fraction
KEYS = ("op case pass impl device threads ms_median ms_p90 flops bytes visible_fraction "
        "block_fraction peak_gflops peak_gbps floor_ms fraction_of_floor peer peer_ms_median").split()


class Refused(Exception):
    """A program does not take a case."""


class Case:
    """One row of T tokens. The letters of the sizes are those of launch/bench/cases.h."""

    def __init__(self, name):
        words = name.split("_")
        self.sigmoid = words[0] == "sigmoid"
        words = words[self.sigmoid:]
        self.name, self.kind, self.dtype = name, words[0], words[1]
        self.size = {k: int(v) for k, v in
                     (re.fullmatch(r"([A-Za-z]+)(\d+)", word).groups() for word in words[2:])}
        self.tokens, self.heads = self.size["T"], self.size["Hq"]
        self.kv_heads, self.head_dim = self.size["Hkv"], self.size["D"]
        self.document = self.size.get("P", self.tokens)
        self.ahead = self.kind[:1] == "b" and self.kind[1:] in ("window", "global", "dilated")
        self.rule = getattr(self, "see_" + (self.kind[1:] if self.ahead else self.kind), None)
        per_head = self.kind == "spans" or (self.kind == "s2" and self.size["V"] > 1)
        self.distinct = range(self.kv_heads) if per_head else range(1)

    @property
    def plain(self):
        """One document, with a mask that every back end knows by name."""
        return self.kind in ("causal", "full") and self.document == self.tokens

    def visible(self, head, q, k):
        """Whether query q of a kv head sees key k; works on integers and on tensors of them."""
        if self.rule is None:
            raise Refused(f"the pattern {self.kind} is not written for peers")
        if self.document == self.tokens:  # what compiled masks evaluate should be short
            return self.rule(head, q, k, 0)
        begin = q - q % self.document
        inside = (k >= begin) & (k < begin + self.document)
        return inside & self.rule(head, q, k, begin)

    def see_full(self, _head, q, k, _begin):
        return (q == q) & (k == k)

    def see_causal(self, _head, q, k, _begin):
        return k <= q

    def near(self, q, k, begin):
        seen = (q - k < self.size["W"]) & (k - q < (self.size["W"] if self.ahead else 1))
        return seen | ((k - begin < self.size.get("S", 0)) & ((k <= q) | self.ahead))

    def see_window(self, _head, q, k, begin):
        return self.near(q, k, begin)

    def see_longgen(self, _head, q, k, begin):
        return (k <= q) & ((q - k < self.size.get("W", 1984)) | (k - begin < self.size.get("S", 64)))

    def see_global(self, _head, q, k, begin):
        return self.near(q, k, begin) | ((q - begin < self.size["S"]) & ((k <= q) | self.ahead))

    def far(self, head, q, k, begin):
        """The strided part of S2 and its local blocks."""
        block = self.size["B"]
        local = q // block - k // block < self.size["L"]
        return local | ((k // block - begin // block + head) % self.size["V"] == 0)

    def see_s2(self, head, q, k, begin):
        step = max(1, self.size["V"] // self.kv_heads)
        dense = head >= self.kv_heads - self.size.get("N", 0)
        return (k <= q) & (dense | self.far(head * step, q, k, begin))

    def see_s2same(self, _head, q, k, begin):
        return (k <= q) & self.far(0, q, k, begin)

    def see_power(self, _head, q, k, begin):
        block = self.size["B"]
        back = q // block - k // block
        sink = k // block - begin // block < self.size.get("S", 1)
        return (k <= q) & ((back < self.size["L"]) | (back & (back - 1) == 0) | sink)

    def see_spans(self, head, q, k, begin):
        return (k <= q) & ((head < self.size["F"]) | (q - k < self.size["W"])
                           | (k - begin < self.size.get("S", 0)))

    def facts(self, pairs, blocks):
        """Visible pairs and the two fractions of what attention would have, per kv head, from sums
        over the distinct heads."""
        n, b, heads = self.tokens, -(-self.tokens // BLOCK), len(self.distinct)
        both_ways = self.kind == "full" or self.ahead
        whole = n * n if both_ways else n * (n + 1) // 2
        whole_blocks = b * b if both_ways else b * (b + 1) // 2
        return pairs / heads, pairs / heads / whole, blocks / heads / whole_blocks

    def count(self):
        """facts(), pair by pair."""
        pairs, seen = 0, set()
        for head in self.distinct:
            for q in range(self.tokens):
                keys = [k for k in range(self.tokens) if self.visible(head, q, k)]
                pairs += len(keys)
                seen.update((head, q // BLOCK, k // BLOCK) for k in keys)
        return self.facts(pairs, len(seen))


def record(op, name, implementation, which, device, **more):
    line = dict.fromkeys(KEYS)
    line.update({"op": op, "case": name, "impl": implementation, "pass": which, "device": device}, **more)
    return line


def read_names(problems, filter_text=""):
    """The case names that --problem gives: names, or files with one a line."""
    names = []
    for problem in problems:
        if os.path.isfile(problem):
            with open(problem, encoding="utf-8") as lines:
                names += [name for line in lines if (name := line.split("#")[0].strip())]
        else:
            names.append(problem)
    return [name for name in names if filter_text in name]


def say(line):
    print(json.dumps(line), flush=True)


def answer(lines, version, run):
    """Reads one name a line and runs it, with a line behind each case, until the input ends."""
    say({"ready": version})
    for line in lines:
        if name := line.strip():
            run(name)
            say({"done": name})


class Contest:
    """Every back end on one case after another. Operands and compiled kernels of a case are kept until
    the next one, so that rounds of the same case, between rounds of another program, only measure.

    make(name of a back end, case) gives an object with forward() and backward(), or raises.
    measure(run) gives median and 90th percentile in ms."""

    def __init__(self, backends, make, measure, passes, report):
        self.backends, self.make, self.measure, self.report = backends, make, measure, report
        self.passes = ("forward", "backward") if passes == "both" else (passes,)
        self.name, self.ready = None, {}

    def prepare(self, name):
        if name == self.name:
            return
        self.ready = {}  # frees the operands of the last case first
        case = Case(name)
        for backend in self.backends:
            try:
                if case.sigmoid:
                    raise Refused("it has no sigmoid attention")
                self.ready[backend] = self.make(backend, case)
            except Exception as error:  # whatever a back end raises is its answer
                self.ready[backend] = first_line(error)
        self.name = name

    def run(self, name):
        self.prepare(name)
        for backend, contestant in self.ready.items():
            if isinstance(contestant, str):
                self.report(name, backend, None, refused=contestant)
                continue
            for which in self.passes:
                try:
                    median, p90 = self.measure(getattr(contestant, which))
                    self.report(name, backend, which, ms_median=median, ms_p90=p90)
                except Exception as error:  # as above
                    self.report(name, backend, which, refused=first_line(error))


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def quantiles(times):
    """Median and 90th percentile (nearest rank) of a list that is not empty."""
    times = sorted(times)
    n = len(times)
    return (times[(n - 1) // 2] + times[n // 2]) / 2, times[-(-9 * n // 10) - 1]
