"""What methods on many devices share: processes, the bytes between them, rank grids, dispatch of tokens, gradients."""
