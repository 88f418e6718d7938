"""Small updates to a large model, and their variants, a file for each system: `lib.core.adapt` puts on all but MoSA."""
