"""From prompts to text: sampling, scheduling, cache pages, the LLM."""
