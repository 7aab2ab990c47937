"""Damages inputs of every kind and uses them: ``python tests/fuzz/run.py --seconds 600 --seed 1``.

Prints one table; exits with 1 if anything failed. ``--out`` keeps each failure, ``--repeat FILE`` runs one again and shows its
traceback.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from fuzz.harness import Runner, fuzz, save_failures  # noqa: E402 (the paths above come first)
from fuzz.kinds import KINDS, MARKER, Case  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default="all", help=f"all, or some of {', '.join(KINDS)}")
    parser.add_argument("--seconds", type=float, default=None, help="how long; default: until --cases")
    parser.add_argument("--cases", type=int, default=None, help="how many; default: 1000 without --seconds")
    parser.add_argument("--out", type=Path, default=None, help="folder for failures and results.json")
    parser.add_argument("--repeat", type=Path, default=None, help="a failure's file")
    args = parser.parse_args()
    if args.repeat:
        return repeat(args.repeat)
    kinds = list(KINDS) if args.kinds == "all" else args.kinds.split(",")
    cases = args.cases if args.cases or args.seconds else 1000
    results = fuzz(args.seed, kinds, cases=cases, seconds=args.seconds, say=lambda line: print(line, flush=True))
    print(results.table())
    print(f"seed {args.seed}, {results.seconds:.0f} s")
    if args.out:
        save_failures(results, args.out)
        (args.out / "results.json").write_text(json.dumps(results.facts(), indent=1))
    return 1 if results.failures else 0


def repeat(path: Path) -> int:
    """Run a kept failure again: in a process with limits, then here, where its traceback can be seen."""
    kept = json.loads(path.read_text())
    files = {name: base64.b64decode(text) for name, text in kept["files"].items()}
    case = Case(files, kept["main"], kept["refused"])
    runner = Runner()
    outcome = runner.run(kept["kind"], case)
    runner.close()
    print(outcome)
    folder = path.with_suffix("")
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    print(f"its files are in {folder}")
    if outcome.verdict in ("foreign", "silent", "message") and kept["kind"] != "code":
        os.environ[MARKER] = str(folder / "code-ran")
        try:
            KINDS[kept["kind"]].use(folder, folder / case.main)
        except BaseException:
            traceback.print_exc()
    return 0


if __name__ == "__main__":
    sys.exit(main())
