"""Whether plugins keep the contracts of grpo-core."""
