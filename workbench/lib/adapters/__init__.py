"""Small updates to a large model, and their variants: `lib.core.adapt` puts them on, a file for each system."""
