"""What searches of architectures share: an evolution that asks for ratings, and a search that is kept and goes on."""
