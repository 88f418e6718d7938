import argparse
import sys
import tempfile
from importlib import import_module
from itertools import islice
from pathlib import Path

from tests.fuzz.harness import try_all


def main() -> int:
    kinds = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "harness")
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Try input that is not as it should be.")
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="so many cases")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = import_module(f"tests.fuzz.{args.kind}").cases(Path(folder), args.seed)
        tally = try_all(islice(made, args.only))
    print(f"{args.kind}, seed {args.seed}: {tally}")
    for fault in tally.faults:
        print(fault)
    return 1 if tally.faults else 0


sys.exit(main())
