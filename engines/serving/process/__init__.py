"""Engine and server in two processes: what they tell each other, and what runs at either end."""
