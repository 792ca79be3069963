"""Foreign data tried in a process of its own, within limits of time and memory, before this one takes it in."""
