"""How far apart two results lie, and how far they may."""
