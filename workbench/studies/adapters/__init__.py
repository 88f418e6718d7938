"""Studies of adapters: all on one bed, every arm at the learning rate that is best for it, see `sweep`."""
