"""How much of each prompt a step computes."""
