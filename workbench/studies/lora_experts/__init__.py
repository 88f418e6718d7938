"""Studies of mixtures of low-rank experts. `bed` is the test-bed that most of them share."""
