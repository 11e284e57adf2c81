"""Runs so many words of grammar.py: any other exception than the documented ones ends it, as does a crash.

    python tests/fuzz/run.py --seed 1 --calls 2000                      words from hypothesis
    python tests/fuzz/run.py --guided build/fuzz/avx2/_C....so          words that reached new code, changed a little;
                                                                        needs LD_PRELOAD of libasan
    python tests/fuzz/run.py --replay 0107...                           one word, said in full

The word in work is always in the file --last, so that a crash can be replayed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.machinery
import importlib.util
import os
import random
import resource
import signal
import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests")]
DOCUMENTED = (RuntimeError, ValueError, TypeError)  # NotImplementedError and FallbackError are RuntimeErrors
# Where an argument is of another kind altogether. What is no tensor has no dim() or requires_grad, and Python's own
# error says so; a check of every argument's type in front of every call would cost each right call its time.
PYTHONS_OWN = (AttributeError,)
MEMORY = 6 << 30
LENGTH = 24


def load_extension(path: Path) -> ctypes.CDLL:
    """Takes the place of handtuned._C before handtuned is imported; what it has seen."""
    loader = importlib.machinery.ExtensionFileLoader("handtuned._C", str(path))
    spec = importlib.util.spec_from_loader("handtuned._C", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["handtuned._C"] = module
    return ctypes.CDLL(str(path))


class Fuzzer:
    def __init__(self, last: Path) -> None:
        from fuzz import grammar

        self.grammar, self.rights = grammar, grammar.right_calls()
        self.last = os.open(last, os.O_CREAT | os.O_RDWR)
        self.calls = self.refused = 0
        for right in self.rights:
            self.finish(right.run(*grammar.own(right.args), **{k: grammar.own(v) for k, v in right.options.items()}))

    def run(self, word: bytes) -> None:
        os.pwrite(self.last, word.hex().ljust(2 * LENGTH + 2).encode(), 0)
        signal.alarm(20)  # ends the process: a call that hangs is not in Python
        call = self.grammar.call_of(word, self.rights)
        self.calls += 1
        torch.manual_seed(0)
        try:
            self.finish(call.right.run(*call.args, **call.options))
        except Exception as error:
            self.refused += 1
            if not self.documented(error, call):
                raise AssertionError(f"{word.hex()}: {call}: {type(error).__name__}: {error}") from error

    def finish(self, result: object) -> None:
        """The backward, where there is one."""
        found = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]
        wanted = [t.float().sum() for t in found if t.requires_grad]
        if wanted:
            torch.stack(wanted).sum().backward()

    def documented(self, error: Exception, call: object) -> bool:
        if "INTERNAL ASSERT" in str(error):
            return False
        if isinstance(error, DOCUMENTED) or (call.other_kind and isinstance(error, PYTHONS_OWN)):
            return True
        if call.right.torchs is None:
            return False
        try:
            call.right.torchs(*call.args, **call.options)
        except Exception as theirs:
            return type(theirs) is type(error)
        return False


def from_hypothesis(fuzzer: Fuzzer, seed: int, calls: int) -> None:
    import hypothesis
    import hypothesis.strategies as st

    settings = hypothesis.settings(
        max_examples=calls, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(st.binary(min_size=LENGTH // 2, max_size=LENGTH))
    def words(word: bytes) -> None:
        fuzzer.run(word)

    words()


def guided(fuzzer: Fuzzer, seed: int, calls: int, library: ctypes.CDLL) -> None:
    """Words that reached code which no word before them did are kept, and the next ones made of them."""
    drawn, reached = random.Random(seed), library.handtuned_blocks_seen()
    start, kept = reached, [drawn.randbytes(LENGTH)]
    for _ in range(calls):
        word = bytearray(drawn.choice(kept) if drawn.random() < 0.7 else drawn.randbytes(LENGTH))
        for _ in range(drawn.randint(1, 3)):
            word[drawn.randrange(LENGTH)] = drawn.randrange(256)
        fuzzer.run(bytes(word))
        if library.handtuned_blocks_seen() > reached:
            reached = library.handtuned_blocks_seen()
            kept.append(bytes(word))
    print(f"{reached} blocks of code reached, {reached - start} of them by {len(kept) - 1} kept words")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--guided", type=Path)
    parser.add_argument("--replay")
    parser.add_argument("--last", type=Path, default=Path(os.devnull))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.guided:
        library = load_extension(options.guided)
    else:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    fuzzer = Fuzzer(options.last)
    if options.replay:
        word = bytes.fromhex(options.replay)
        print(fuzzer.grammar.call_of(word, fuzzer.rights), flush=True)
        fuzzer.run(word)
    elif options.guided:
        guided(fuzzer, options.seed, options.calls, library)
    else:
        from_hypothesis(fuzzer, options.seed, options.calls)
    print(f"seed {options.seed}: {fuzzer.calls} calls, {fuzzer.refused} refused, as documented")


if __name__ == "__main__":
    main()
