"""`python -m workbench.bench.distributed SLUG [--quick] [--keep]`: see `real_runs.main`."""

from workbench.bench.real_runs import main

if __name__ == "__main__":
    main("distributed")
