"""`python -m workbench.bench.distributed SLUG [--quick] [--keep]`: one system; --keep writes it beside its study."""

import argparse
import json

from workbench.bench.distributed import measure, systems
from workbench.catalogue import PACKAGE


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbench.bench.distributed", description=__doc__)
    parser.add_argument("slug", choices=systems())
    parser.add_argument("--quick", action="store_true", help="small problems: to see that it works")
    parser.add_argument("--keep", action="store_true", help="write the record beside the study")
    args = parser.parse_args()
    record = measure(args.slug, args.quick)
    for row in record.table():
        print(json.dumps(row))
    print(f"median error {record.median_error:.1%}, accuracy {record.accuracy:.1%}")
    if args.keep:
        record.write(PACKAGE / "studies" / "distributed" / "measured" / f"{args.slug.replace('-', '_')}.json")


if __name__ == "__main__":
    main()
